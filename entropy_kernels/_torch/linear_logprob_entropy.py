"""Log-probability and entropy of every row, in one walk over the vocabulary.

Three numbers a row are kept. Relative to the running maximum m, and with one maximum itself left
out of both sums,

    s = sum_j exp(d_j),   t = sum_j d_j exp(d_j),   d_j = (z_j - m) / temperature
    log-sum-exp = m / temperature + log1p(s),   H = log1p(s) - t / (1 + s)

Neither term of H is negative, so entropies of 1e-12 keep their digits where log-sum-exp minus
E[z] would cancel. Logits and sums of a block are fp32, blocks are merged in fp64.

T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from .._rows import ForwardRows, per_row
from .blocks import (
    LOWEST_EXPONENT,
    Head,
    at,
    compute_dtype,
    sizes,
    slices,
    target_column,
    view,
    workspace,
)
from .moments import block_moments, finish_moments, merge_moments

# The running maximum's start: finite, so that a block of -inf throughout merges without inf - inf.
LOWEST = -1e30


def linear_logprob_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    keep_logits: bool,
    moments: Tensor | None = None,
) -> ForwardRows:
    """The statistics of every row; zeros where the target is `ignore_index`.

    `moments`, fp32 [4, T], is filled with what _rows.STATISTICS names.

    On a CPU the ignored rows are dropped before the products. On CUDA their number would have to
    reach the host first, so they are computed, then zeroed.
    """
    head = Head(weight_VD, bias_V, softcap)
    kept_T = target_T != ignore_index
    temperature_T = per_row(temperature, target_T)
    if hidden_TD.device.type != "cpu" or keep_logits or bool(kept_T.all()):
        found = _statistics(hidden_TD, target_T, temperature_T, head, keep_logits, moments)
        if moments is not None:
            moments.masked_fill_(~kept_T, 0)
        rows = [torch.where(kept_T, x, 0) for x in found[:5]]
        return ForwardRows._make([*rows, found.logits, None])

    index_R = kept_T.nonzero().squeeze(1)
    few = None if moments is None else moments.new_empty(4, index_R.numel())
    found = _statistics(
        hidden_TD[index_R], target_T[index_R], at(temperature_T, index_R), head, False, few
    )
    if moments is not None and few is not None:
        moments.zero_().index_copy_(1, index_R, few)
    zero_T = hidden_TD.new_zeros(target_T.shape, dtype=torch.float32)
    rows = [zero_T.index_copy(0, index_R, x) for x in found[:5]]
    return ForwardRows._make([*rows, found.logits, None])


def _statistics(
    hidden_TD: Tensor,
    target_T: Tensor,
    temperature_T: Tensor | None,
    head: Head,
    keep_logits: bool,
    moments: Tensor | None,
) -> ForwardRows:
    """The same without ignored rows; a row that has no answer is NaN."""
    count, vocabulary = target_T.shape[0], head.weight_VD.shape[0]
    block_t, block_v = sizes(hidden_TD)
    max_T = torch.full((count,), LOWEST, dtype=torch.float32, device=hidden_TD.device)
    # s and t; with moments u, s2 and t2 too.
    fields = 2 if moments is None else 5
    sums = torch.zeros(fields, count, dtype=torch.float64, device=hidden_TD.device)
    target_logit_T = torch.zeros_like(max_T)
    logits_TV = max_T.new_empty((count, vocabulary) if keep_logits else (0,))
    e_buffer = workspace(count, vocabulary, hidden_TD)

    for v in slices(vocabulary, block_v):
        weight = compute_dtype(head.weight_VD[v])
        for rows in slices(count, block_t):
            z = head.logits(hidden_TD[rows], weight, v)
            if keep_logits:
                logits_TV[rows, v] = z
            z = head.cap(z)
            column, inside = target_column(target_T[rows], v)
            target_logit_T[rows] = torch.where(
                inside, z.gather(1, column).squeeze(1), target_logit_T[rows]
            )
            scale = at(temperature_T, rows)
            block = _block_sums(z, scale, e_buffer, moments is not None)
            max_T[rows], sums[:, rows] = _merge((max_T[rows], *sums[:, rows]), block, scale)

    found = _finish(max_T, sums[0], sums[1], target_logit_T, temperature_T)
    # A row of -inf throughout has no distribution.
    valid_T = (max_T > LOWEST) & (target_T >= 0) & (target_T < vocabulary)
    if temperature_T is not None:
        valid_T &= temperature_T > 0
    if moments is not None:
        moments.copy_(torch.where(valid_T, finish_moments(sums), torch.nan))
    rows_T = [torch.where(valid_T, x, torch.nan) for x in found]
    return ForwardRows._make([*rows_T, logits_TV, None])


def _block_sums(
    z_TV: Tensor, temperature_T: Tensor | None, buffer: Tensor, with_moments: bool
) -> tuple[Tensor, ...]:
    """(max, s, t) of one block of logits, which is overwritten. NaN stays NaN throughout.

    With moments, what moments.py sums of it follows.
    """
    max_T, peak_T = z_TV.max(1)
    max_T = max_T.clamp_min(LOWEST)
    d_TV = z_TV.sub_(max_T.unsqueeze(1))
    if temperature_T is not None:
        d_TV.div_(temperature_T.unsqueeze(1))
    d_TV.clamp_min_(LOWEST_EXPONENT)
    e_TV = torch.exp(d_TV, out=view(buffer, *d_TV.shape))
    # One maximum is the 1 that s leaves out; others that tie with it stay in.
    e_TV.scatter_(1, peak_T.unsqueeze(1), 0.0)
    s_T = e_TV.sum(1).double()
    more = block_moments(e_TV, d_TV) if with_moments else ()
    return max_T, s_T, e_TV.mul_(d_TV).sum(1).double(), *more


def _merge(
    left: tuple[Tensor, ...], right: tuple[Tensor, ...], temperature_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """max, and the sums [2 or 5, T], of the union of two sets of columns.

    Each moves to the larger maximum by t <- a (t + (1 + s) shift), a = exp(shift).
    """
    max_T = torch.maximum(left[0], right[0])
    moved_t = torch.zeros_like(left[2])
    moved_sum, shifts = [], []
    for block_max_T, s_T, t_T, *_ in (left, right):
        shift_T = block_max_T.double() - max_T
        if temperature_T is not None:
            shift_T = shift_T / temperature_T
        shifts.append(shift_T)
        scale_T = shift_T.exp()
        moved_sum.append(scale_T * (1 + s_T))
        moved_t += scale_T * t_T + moved_sum[-1] * shift_T
    s_T = torch.where(left[0] >= right[0], left[1] + moved_sum[1], right[1] + moved_sum[0])
    more = merge_moments(left[1:], right[1:], *shifts) if len(left) > 3 else ()
    return max_T, torch.stack([s_T, moved_t, *more])


def _finish(
    max_T: Tensor, s_T: Tensor, t_T: Tensor, target_logit_T: Tensor, temperature_T: Tensor | None
) -> list[Tensor]:
    """Log-probability, entropy, log-sum-exp, max and log sum, fp32."""
    max_T = max_T.where(max_T < torch.inf, torch.nan)  # a logit of inf leaves no distribution
    log_sum_T = s_T.log1p()
    distance_T, peak_T = target_logit_T.double() - max_T, max_T.double()
    if temperature_T is not None:
        distance_T, peak_T = distance_T / temperature_T, peak_T / temperature_T
    entropy_T = log_sum_T - t_T / (1 + s_T)
    found = [distance_T - log_sum_T, entropy_T, peak_T + log_sum_T, max_T, log_sum_T]
    return [x.float() for x in found]
