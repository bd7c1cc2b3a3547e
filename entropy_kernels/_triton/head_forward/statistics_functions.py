"""Sums behind varentropy, largest probability, the sums of p^2 and p^2 log p, the mean logit, and
whether the target is the first of the largest logits: tile by tile.

Three more numbers per row join n, s and u of row_sum_functions.py, in the same units and relative
to the same largest logit:

    w = sum d^2 2^d,   q = sum 2^(2 d) over all but the maximum's ties,   r = sum d 2^(2 d)

With Z = s + n, L = log1p(Z - 1), R = Z - 1,

    varentropy  = ln(2)^2 (w + (w R - u^2)) / Z^2
    max_prob    = 1 / Z
    sum_p2      = (q + n) / Z^2
    sum_p2_logp = (ln(2) r - L (q + n)) / Z^2

w R - u^2 is not negative (Cauchy and Schwarz), so nothing cancels where the entropy is small.

The others need no exponential: the mean of z over V, whose terms z / V cannot overflow, and the
column `first` of the first maximum, which is the target's or not. The target's own logit would not
do: it comes from another product, which may round otherwise.

T tokens, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LN2, LOWEST, LOWEST_EXPONENT

# Behind every column.
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def moved_statistics(m, n, s, u, w, q, r, scale, top):
    """(w, q, r) of columns whose maximum was m, relative to top >= m; n, s and u are not moved."""
    distance = (m - top) * scale
    a = tl.exp2(distance)
    shift = tl.maximum(distance, LOWEST_EXPONENT)
    w = a * (w + shift * (2.0 * u + (s + n) * shift))
    r = a * a * (r + (q + n) * shift)
    return w, tl.where(m == top, q, a * a * (q + n)), r


@triton.jit
def statistics_of_tile(z, top, scale):
    """(w, q, r) of a tile z [T, V] relative to top [T], at least its maximum."""
    d = (z - top[:, None]) * scale[:, None]
    e = tl.exp2(d)
    # Unclamped, a logit of -inf would give 0 * -inf.
    near = tl.maximum(d, LOWEST_EXPONENT)
    w = tl.sum(e * (near * near), 1)
    square = tl.where(d == 0.0, 0.0, e * e)
    return w, tl.sum(square, 1), tl.sum(square * near, 1)


@triton.jit
def logits_of_tile(z, top, offs_v, V):
    """The share of a tile z [T, V] in the mean logit, and its first column that holds top [T].

    Without such a column it is NOWHERE.
    """
    mean = tl.sum(tl.where((offs_v < V)[None, :], z * (1.0 / V), 0.0), 1)
    return mean, tl.min(tl.where(z == top[:, None], offs_v[None, :], NOWHERE), 1)


@triton.jit
def store_statistics(partials_ptr, split, n_split, offs_t, end_t, T, w, q, r, mean, first):
    """Into fields 4 to 8 of partials [9, S, T], rows before end_t."""
    mask = offs_t < end_t
    field = tl.cast(n_split, tl.int64) * T
    offs = 4 * field + tl.cast(split, tl.int64) * T + offs_t
    tl.store(partials_ptr + offs, w, mask=mask)
    tl.store(partials_ptr + field + offs, q, mask=mask)
    tl.store(partials_ptr + 2 * field + offs, r, mask=mask)
    tl.store(partials_ptr + 3 * field + offs, mean, mask=mask)
    # A column's number keeps its bits.
    tl.store(partials_ptr + 4 * field + offs, first.to(tl.float32, bitcast=True), mask=mask)


@triton.jit
def merged_logits(partials_ptr, slot, valid, T, n_split, m, mean, first, BLOCK_S: tl.constexpr):
    """(mean, first) over all splits, m [T] the maximum of them.

    A walk of its own: within that of the other sums, these two would spill.
    """
    field = tl.cast(n_split, tl.int64) * T
    for start in range(0, n_split, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_split)[:, None] & valid[None, :]
        ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * T + slot[None, :]
        mean += tl.sum(tl.load(ptrs + 7 * field, mask=mask, other=0.0), 0)
        m_ST = tl.load(ptrs, mask=mask, other=LOWEST)
        first_ST = tl.load(ptrs + 8 * field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        first = tl.minimum(first, tl.min(tl.where(m_ST == m[None, :], first_ST, NOWHERE), 0))
    return mean, first


@triton.jit
def finish_statistics(
    statistics_ptr, offs_t, mask_t, T, n, rest, u, w, q, r, log_sum, mean, is_top1, valid, factor
):
    """Into statistics [6, T], in the order of STATISTICS; zeros and NaN as in `merge_kernel`."""
    most = 1.0 / (1.0 + rest)
    apart = w * rest - u * u
    apart = tl.where(apart < 0.0, 0.0, apart)
    varentropy = (LN2 * LN2) * (w + apart) * most * most
    squares = (q + n) * most * most
    weighted = LN2 * r * most * most - log_sum * squares
    ptrs = statistics_ptr + offs_t
    field = tl.cast(T, tl.int64)
    tl.store(ptrs, tl.where(valid, varentropy * factor, 0.0), mask=mask_t)
    tl.store(ptrs + field, tl.where(valid, most * factor, 0.0), mask=mask_t)
    tl.store(ptrs + 2 * field, tl.where(valid, squares * factor, 0.0), mask=mask_t)
    tl.store(ptrs + 3 * field, tl.where(valid, weighted * factor, 0.0), mask=mask_t)
    tl.store(ptrs + 4 * field, tl.where(valid, mean * factor, 0.0), mask=mask_t)
    top1 = tl.where(is_top1, 1.0, 0.0)
    tl.store(ptrs + 5 * field, tl.where(valid, top1 * factor, 0.0), mask=mask_t)
