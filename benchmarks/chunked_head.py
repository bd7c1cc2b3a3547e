"""A head in blocks of tokens and vocabulary, as prime-rl's trainer has one: logits are found twice.

Logits are products in the inputs' dtype, converted to fp32. Forward keeps one logsumexp per token;
backward computes the logits again. Its gradients are added up in the dtype of the weight. Entropies
are not differentiated.

T tokens, R of them in a block, D hidden, V vocabulary, C of it in a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOKENS, VOCABULARY = 1024, 8192


class ChunkedHead(torch.autograd.Function):
    """Log-probabilities and entropies [T], fp32, of hidden [T, D], weight [V, D], target [T]."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        blocks = zip(hidden_TD.split(TOKENS), target_T.split(TOKENS), strict=True)
        found = [_statistics(hidden_RD, weight_VD, target_R) for hidden_RD, target_R in blocks]
        logprob_T, entropy_T, logsumexp_T = (torch.cat(rows) for rows in zip(*found, strict=True))
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, logsumexp_T)
        ctx.mark_non_differentiable(entropy_T)
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        hidden_TD, weight_VD, target_T, logsumexp_T = ctx.saved_tensors
        dhidden_TD, dweight_VD = torch.zeros_like(hidden_TD), torch.zeros_like(weight_VD)
        rows = (x.split(TOKENS) for x in (hidden_TD, target_T, logsumexp_T, grad_T, dhidden_TD))
        for hidden_RD, target_R, logsumexp_R, grad_R, dhidden_RD in zip(*rows, strict=True):
            for start, weight_CD in _blocks(weight_VD):
                z_RC = (hidden_RD @ weight_CD.T).float()
                dz_RC = -grad_R.unsqueeze(1) * (z_RC - logsumexp_R.unsqueeze(1)).exp()
                column_R1, inside_R = _column(target_R, start, len(weight_CD))
                dz_RC.scatter_add_(1, column_R1, (grad_R * inside_R).unsqueeze(1))
                dz_RC = dz_RC.to(weight_VD.dtype)
                dhidden_RD += dz_RC @ weight_CD
                dweight_VD[start : start + VOCABULARY] += dz_RC.T @ hidden_RD
        return dhidden_TD, dweight_VD, None


def _statistics(
    hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy and logsumexp: running maximum m, sum e^(z - m) and sum z e^(z - m)."""
    sum_R, weighted_R, chosen_R = torch.zeros(3, len(target_R), device=hidden_RD.device)
    max_R = torch.full_like(sum_R, -torch.inf)
    for start, weight_CD in _blocks(weight_VD):
        z_RC = (hidden_RD @ weight_CD.T).float()
        old_R, max_R = max_R, torch.maximum(max_R, z_RC.amax(1))
        shrink_R, e_RC = (old_R - max_R).exp(), (z_RC - max_R.unsqueeze(1)).exp()
        sum_R = sum_R * shrink_R + e_RC.sum(1)
        weighted_R = weighted_R * shrink_R + (e_RC * z_RC).sum(1)
        column_R1, inside_R = _column(target_R, start, len(weight_CD))
        chosen_R = torch.where(inside_R, z_RC.gather(1, column_R1).squeeze(1), chosen_R)
    logsumexp_R = max_R + sum_R.log()
    return chosen_R - logsumexp_R, logsumexp_R - weighted_R / sum_R, logsumexp_R


def _blocks(weight_VD: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(weight_VD), VOCABULARY):
        yield start, weight_VD[start : start + VOCABULARY]


def _column(target_R: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a block, [R, 1], clamped into it; and whether it lies there."""
    column_R = target_R - start
    inside_R = (column_R >= 0) & (column_R < length)
    return column_R.clamp(0, length - 1).unsqueeze(1), inside_R
