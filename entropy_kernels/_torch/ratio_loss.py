"""The clipped policy loss with its gradient written out, on any device, without synchronising it.

B sequences, L their length.
"""

import torch
from torch import Tensor


def ratio_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    advantage_BL: Tensor,
    selected_BL: Tensor,
    weight_B: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_bound: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_bt weight_b * loss_bt over the selected tokens, and its gradient with respect to logprob.

    r = exp(logprob - old_logprob), the log bounded by `log_ratio_bound` on both sides
    loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), for A < 0 at most -dual_clip A

    The gradient is -weight r A, and exactly 0 where r is clipped, the bound is passed, A is 0 or
    the token is not selected. On a bound itself r counts as inside. A NaN of a selected token
    reaches the loss and the token's gradient, whatever A is.

    Returns:
        - loss [] and grad [B, L], in logprob's dtype
        - sums [4], in that dtype: of r, the largest r, of log r, and of r - 1 - log r, over the
          selected tokens
        - counts int64 [3]: tokens clipped low, those clipped high, and those with a gradient
    """
    zero = logprob_BL.new_zeros(())
    advantage_BL = torch.where(selected_BL, advantage_BL, zero)
    free_BL = torch.where(selected_BL, logprob_BL - old_logprob_BL, zero)
    log_ratio_BL = free_BL.clamp(-log_ratio_bound, log_ratio_bound)
    ratio_BL = log_ratio_BL.exp()
    plain_BL = ratio_BL * advantage_BL
    clipped_BL = ratio_BL.clamp(1 - clip_low, 1 + clip_high) * advantage_BL
    loss_BL = -torch.minimum(plain_BL, clipped_BL)
    low_BL = ratio_BL < 1 - clip_low
    if dual_clip is not None:
        most_BL = torch.where(advantage_BL < 0, -dual_clip * advantage_BL, torch.inf)
        loss_BL = torch.minimum(loss_BL, most_BL)
        low_BL |= ratio_BL > dual_clip
    low_BL &= advantage_BL < 0
    high_BL = (advantage_BL > 0) & (ratio_BL > 1 + clip_high)
    flat_BL = low_BL | high_BL | (advantage_BL == 0) | (free_BL.abs() > log_ratio_bound)
    flat_BL &= ~plain_BL.isnan()
    grad_BL = torch.where(flat_BL, zero, -plain_BL * weight_B.unsqueeze(1))

    selected_ratio_BL = torch.where(selected_BL, ratio_BL, zero)
    largest = selected_ratio_BL.amax() if selected_BL.numel() else zero
    excess = (log_ratio_BL.expm1() - log_ratio_BL).sum()
    sums = torch.stack([selected_ratio_BL.sum(), largest, log_ratio_BL.sum(), excess])
    counts = torch.stack([low_BL.sum(), high_BL.sum(), (grad_BL != 0).sum()])
    return (loss_BL.sum(1) * weight_B).sum(), grad_BL, sums, counts
