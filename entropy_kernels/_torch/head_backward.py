"""The head's backward: gradients from the rows whose incoming gradient is not zero.

    dz_j = [g_logprob (1[j = target] - p_j) + g_logsumexp p_j - g_entropy p_j (log p_j + H)] / temp

The logits of those rows are recomputed one vocabulary block at a time; each row of the weight's
gradient is written, or added to, once, the hidden states' gradient is summed over blocks in fp32.

T tokens, R active rows, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import ForwardRows, active_rows, spread
from ..head import Head
from .blocks import (
    LOWEST_EXPONENT,
    at,
    compute_dtype,
    logits,
    product,
    sizes,
    slices,
    target_column,
    view,
    workspace,
)


class _Active(NamedTuple):
    """The active rows: their numbers, the gradients that arrive, and forward's results, all [R]."""

    number: Tensor
    grad_logprob: Tensor | None
    grad_entropy: Tensor | None
    grad_logsumexp: Tensor | None
    target: Tensor
    temperature: Tensor | None
    entropy: Tensor
    max: Tensor
    log_sum: Tensor

    def chunk(self, rows: slice) -> "_Active":
        return _Active(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class _Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def backward(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    head: Head,
    rows: ForwardRows,
    needs: tuple[bool, bool, bool],
    *,
    main_grad: Tensor | None = None,
    reduce_hidden: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from those of logprob, entropy and log-sum-exp.

    A gradient that `needs` does not ask for is None, and so is the weight's where it is added to
    `main_grad`, [V, D] of any dtype. On CUDA the host waits for the number of active rows.

    `reduce_hidden` changes the hidden states' gradient of the active rows, fp32 [R, D], in place
    before it is rounded. It adds what ranks with other rows of the weight have.
    """
    index_R = active_rows(gradients, head.target, head.ignore_index)
    grad_logprob_R, grad_entropy_R, grad_logsumexp_R = (
        None if grad_T is None else grad_T[index_R].float() for grad_T in gradients
    )
    active = _Active(
        index_R,
        grad_logprob_R,
        grad_entropy_R,
        grad_logsumexp_R,
        head.target[index_R],
        at(head.temperature_T, index_R),
        rows.entropy[index_R],
        rows.max[index_R],
        rows.log_sum[index_R],
    )
    logits_TV = rows.logits if rows.logits.numel() else None
    dhidden_RD, dweight_VD, dbias_V = _gradients(
        head.hidden[index_R], active, head, logits_TV, _Needs(*needs), main_grad
    )
    if dhidden_RD is not None and reduce_hidden is not None:
        reduce_hidden(dhidden_RD)
    dhidden_TD = None if dhidden_RD is None else spread(dhidden_RD, index_R, head.hidden)
    return dhidden_TD, dweight_VD, dbias_V


def _gradients(
    hidden_RD: Tensor,
    active: _Active,
    head: Head,
    logits_TV: Tensor | None,
    needs: _Needs,
    main_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over the vocabulary, and a product of [R, V, D] for each gradient that is needed."""
    count, vocabulary = hidden_RD.shape[0], head.weight.shape[0]
    block_t, block_v = sizes(hidden_RD)
    p_buffer = workspace(count, vocabulary, hidden_RD)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": hidden_RD.device}
    dhidden_RD = torch.zeros(hidden_RD.shape, **fp32) if needs.hidden else None
    own = needs.weight and main_grad is None
    dweight_VD = _empty_like(head.weight) if own else None
    dbias_V = torch.zeros(vocabulary, **fp32) if needs.bias else None

    for v in slices(vocabulary, block_v):
        weight = compute_dtype(head.weight[v])
        dweight = None
        for chunk in slices(count, block_t):
            some, hidden = active.chunk(chunk), compute_dtype(hidden_RD[chunk])
            stored = None if logits_TV is None else logits_TV[some.number, v]
            z = logits(hidden, weight, head, v) if stored is None else stored
            dz = _dlogits(z, some, head.softcap, v, p_buffer)
            if dbias_V is not None:
                dbias_V[v] += dz.sum(0)
            dz = dz.to(hidden.dtype)
            if needs.weight:
                part = product(dz.T, hidden)
                dweight = part if dweight is None else dweight.add_(part)
            if dhidden_RD is not None:
                dhidden_RD[chunk] += product(dz, weight)
        if dweight_VD is not None:
            dweight_VD[v] = 0 if dweight is None else dweight
        elif main_grad is not None and dweight is not None:
            main_grad[v] += dweight
    if dbias_V is not None and head.bias is not None:
        dbias_V = dbias_V.to(head.bias.dtype)
    return dhidden_RD, dweight_VD, dbias_V


def _dlogits(
    z_RV: Tensor, rows: _Active, softcap: float | None, v: slice, buffer: Tensor
) -> Tensor:
    """The gradient of one block of logits h W^T + b; the block is overwritten.

    Off the target dz_j = p_j (rest - g_logprob - g_entropy log p_j). At the target
    g_logprob (1 - p) comes from expm1, which keeps its digits when p is near 1.
    """
    zero = torch.zeros_like(rows.entropy)
    g_logprob, g_entropy, g_logsumexp = (
        zero if grad is None else grad
        for grad in (rows.grad_logprob, rows.grad_entropy, rows.grad_logsumexp)
    )
    if rows.temperature is not None:
        g_logprob, g_entropy = g_logprob / rows.temperature, g_entropy / rows.temperature
        g_logsumexp = g_logsumexp / rows.temperature
    rest = g_logsumexp - g_entropy * rows.entropy

    slope_RV = None
    if softcap is not None:
        slope_RV = 1 - z_RV.div_(softcap).tanh_().square()
        z_RV.mul_(softcap)
    logp_RV = z_RV.sub_(rows.max.unsqueeze(1))
    if rows.temperature is not None:
        logp_RV.div_(rows.temperature.unsqueeze(1))
    logp_RV.sub_(rows.log_sum.unsqueeze(1)).clamp_min_(LOWEST_EXPONENT)
    column, inside = target_column(rows.target, v)
    logp_target = logp_RV.gather(1, column).squeeze(1)
    dz_target = logp_target.exp() * (rest - g_entropy * logp_target)
    dz_target -= g_logprob * logp_target.expm1()

    p_RV = torch.exp(logp_RV, out=view(buffer, *z_RV.shape))
    # A logit of -inf has p = 0 exactly.
    torch.threshold_(p_RV, 2e-38, 0.0)
    factor = (rest - g_logprob).unsqueeze(1)
    if rows.grad_entropy is None:
        dz_RV = p_RV.mul_(factor)
    else:
        dz_RV = logp_RV.mul_(-g_entropy.unsqueeze(1)).add_(factor).mul_(p_RV)
    elsewhere = dz_RV.gather(1, column).squeeze(1)
    dz_RV.scatter_(1, column, torch.where(inside, dz_target, elsewhere).unsqueeze(1))
    return dz_RV if slope_RV is None else dz_RV.mul_(slope_RV)


def _empty_like(weight_VD: Tensor) -> Tensor:
    return torch.empty(weight_VD.shape, dtype=weight_VD.dtype, device=weight_VD.device)
