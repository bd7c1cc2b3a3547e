"""The head's forward: log-probability and entropy of every row, in one walk over the vocabulary.

Each row has a running maximum m and two sums, relative to m and without one maximum itself,

    s = sum_j exp(d_j),   t = sum_j d_j exp(d_j),   d_j = (z_j - m) / temperature
    log-sum-exp = m / temperature + log1p(s),   H = log1p(s) - t / (1 + s)

Neither term of H is negative, so entropies of 1e-12 keep their digits where log-sum-exp minus
E[z] would cancel. Logits and sums of a block are fp32, blocks are merged in fp64.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._rows import ForwardRows
from ..head import Head
from .blocks import (
    LOWEST_EXPONENT,
    at,
    compute_dtype,
    few_passes,
    logits,
    sizes,
    slices,
    target_column,
    view,
    workspace,
)
from .statistics import block_sums, finish_statistics, merge_sums

# The running maximum's start: finite, so that a block of -inf throughout merges without inf - inf.
LOWEST = -1e30


def forward(head: Head, *, keep_logits: bool, statistics: Tensor | None = None) -> ForwardRows:
    """Log-probability, entropy and what backward needs; zeros in the rows without a target.

    `statistics`, fp32 [6, T], is filled with what _rows.STATISTICS names.

    On a CPU the rows without a target are dropped before the products. On CUDA the host would have
    to wait for their number, so they are computed, then zeroed.
    """
    valid_T = head.valid
    if head.hidden.device.type != "cpu" or keep_logits or bool(valid_T.all()):
        rows = _all_rows(head, keep_logits, statistics)
        if statistics is not None:
            statistics.masked_fill_(~valid_T, 0)
        own_rows = [torch.where(valid_T, x, 0) for x in rows[:5]]
        return ForwardRows._make([*own_rows, rows.logits, None])

    index_R = valid_T.nonzero().squeeze(1)
    some = None if statistics is None else statistics.new_empty(6, index_R.numel())
    rows = _all_rows(head.at(index_R), False, some)
    if statistics is not None and some is not None:
        statistics.zero_().index_copy_(1, index_R, some)
    zero_T = head.hidden.new_zeros(head.target.shape, dtype=torch.float32)
    own_rows = [zero_T.index_copy(0, index_R, x) for x in rows[:5]]
    return ForwardRows._make([*own_rows, rows.logits, None])


def _all_rows(head: Head, keep_logits: bool, statistics: Tensor | None) -> ForwardRows:
    """The same of a head whose rows all have a target; a row that has no answer is NaN."""
    count, vocabulary = head.target.shape[0], head.weight.shape[0]
    temperature_T = head.temperature_T
    block_t, block_v = sizes(head.hidden)
    max_T = torch.full((count,), LOWEST, dtype=torch.float32, device=head.hidden.device)
    # s and t; with statistics u, s2 and t2 too.
    fields = 2 if statistics is None else 5
    sums = torch.zeros(fields, count, dtype=torch.float64, device=head.hidden.device)
    target_logit_T = torch.zeros_like(max_T)
    # For statistics: the sum of the logits, and the column of the first maximum.
    total_T, first_T = torch.zeros_like(sums[0]), torch.full_like(head.target, -1)
    logits_TV = max_T.new_empty((count, vocabulary) if keep_logits else (0,))
    e_buffer = workspace(count, vocabulary, head.hidden)

    for v in slices(vocabulary, block_v):
        weight = compute_dtype(head.weight[v])
        for rows in slices(count, block_t):
            z = logits(head.hidden[rows], weight, head, v)
            if keep_logits:
                logits_TV[rows, v] = z
            if head.softcap is not None:
                z.div_(head.softcap).tanh_().mul_(head.softcap)
            column, inside = target_column(head.target[rows], v)
            target_logit_T[rows] = torch.where(
                inside, z.gather(1, column).squeeze(1), target_logit_T[rows]
            )
            scale, peak = at(temperature_T, rows), z.max(1)
            if statistics is not None:
                total_T[rows] += z.sum(1, dtype=torch.float64)
                first = (peak.indices + v.start).where(peak.values > max_T[rows], first_T[rows])
                first_T[rows] = first
            block = _block_sums(z, peak, scale, e_buffer, statistics is not None)
            max_T[rows], sums[:, rows] = _merge((max_T[rows], *sums[:, rows]), block, scale)

    rows_T = _finish(max_T, sums[0], sums[1], target_logit_T, temperature_T)
    # A row of -inf throughout has no distribution, nor has one with inf.
    has_answer_T = (
        (max_T > LOWEST) & (max_T < torch.inf) & (head.target >= 0) & (head.target < vocabulary)
    )
    if temperature_T is not None:
        has_answer_T &= (temperature_T > 0) & (temperature_T < torch.inf)
    if statistics is not None:
        mean_T = total_T / vocabulary
        mean_T = mean_T if temperature_T is None else mean_T / temperature_T
        found = finish_statistics(sums, mean_T, first_T == head.target)
        statistics.copy_(torch.where(has_answer_T, found, torch.nan))
    rows_T = [torch.where(has_answer_T, x, torch.nan) for x in rows_T]
    return ForwardRows._make([*rows_T, logits_TV, None])


def _block_sums(
    z_TV: Tensor,
    peak: Sequence[Tensor],
    temperature_T: Tensor | None,
    buffer: Tensor,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    """(max, s, t) of one block of logits, which is overwritten. NaN stays NaN throughout.

    The sums of statistics.py follow where statistics are wanted. peak: `z_TV.max(1)`.
    """
    max_T, peak_T = peak
    max_T = max_T.clamp_min(LOWEST)
    if few_passes(z_TV) and not with_statistics:
        if temperature_T is not None:
            z_TV.sub_(max_T.unsqueeze(1)).div_(temperature_T.unsqueeze(1))
        return max_T, *_sums_of_shares(z_TV, peak_T.unsqueeze(1), max_T > LOWEST, buffer)
    d_TV = z_TV.sub_(max_T.unsqueeze(1))
    if temperature_T is not None:
        d_TV.div_(temperature_T.unsqueeze(1))
    d_TV.clamp_min_(LOWEST_EXPONENT)
    e_TV = torch.exp(d_TV, out=view(buffer, *d_TV.shape))
    # One maximum is the 1 that s leaves out; others that tie with it stay in.
    e_TV.scatter_(1, peak_T.unsqueeze(1), 0.0)
    s_T = e_TV.sum(1).double()
    more = block_sums(e_TV, d_TV) if with_statistics else ()
    return max_T, s_T, e_TV.mul_(d_TV).sum(1).double(), *more


def _sums_of_shares(
    z_TV: Tensor, peak_T1: Tensor, any_T: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """s and t by 32 bytes of memory traffic per logit, where exp(d) and d exp(d) need 52.

    With q = exp(d) / Z, the share of a column in its block, and Z = 1 + s,

        s = sum q / max q,   t = Z sum q log q + s log Z

    A block of -inf throughout has no shares, and sums of 0.
    """
    q_TV = torch.ops.aten._softmax.out(z_TV, 1, False, out=view(buffer, *z_TV.shape))
    top_T = q_TV.gather(1, peak_T1).squeeze(1).double()
    q_TV.scatter_(1, peak_T1, 0.0)
    s_T = q_TV.sum(1).double() / top_T
    entropy_T = torch.special.entr(q_TV, out=q_TV).sum(1).double()
    t_T = s_T * s_T.log1p() - (1 + s_T) * entropy_T
    return s_T.where(any_T, 0.0), t_T.where(any_T, 0.0)


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
    more = merge_sums(left[1:], right[1:], *shifts) if len(left) > 3 else ()
    return max_T, torch.stack([s_T, moved_t, *more])


def _finish(
    max_T: Tensor, s_T: Tensor, t_T: Tensor, target_logit_T: Tensor, temperature_T: Tensor | None
) -> list[Tensor]:
    """Log-probability, entropy, log-sum-exp, max and log sum, fp32."""
    log_sum_T = s_T.log1p()
    distance_T, peak_T = target_logit_T.double() - max_T, max_T.double()
    if temperature_T is not None:
        distance_T, peak_T = distance_T / temperature_T, peak_T / temperature_T
    entropy_T = log_sum_T - t_T / (1 + s_T)
    rows_T = [distance_T - log_sum_T, entropy_T, peak_T + log_sum_T, max_T, log_sum_T]
    return [x.float() for x in rows_T]
