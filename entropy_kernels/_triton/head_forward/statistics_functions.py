"""Sums behind varentropy, largest probability, and the sums of p^2 and p^2 log p: tile by tile.

Three more numbers per row join n, s and u of row_sum_functions.py, in the same units and relative
to the same largest logit:

    w = sum d^2 2^d,   q = sum 2^(2 d) over all but the maximum's ties,   r = sum d 2^(2 d)

With Z = s + n, L = log1p(Z - 1), R = Z - 1,

    varentropy  = ln(2)^2 (w + (w R - u^2)) / Z^2
    max_prob    = 1 / Z
    sum_p2      = (q + n) / Z^2
    sum_p2_logp = (ln(2) r - L (q + n)) / Z^2

w R - u^2 is not negative (Cauchy and Schwarz), so nothing cancels where the entropy is small.

T tokens, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LN2, LOWEST_EXPONENT


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
def store_statistics(partials_ptr, split, n_split, offs_t, end_t, T, w, q, r):
    """Into fields 4 to 6 of partials [7, S, T], rows before end_t."""
    mask = offs_t < end_t
    field = tl.cast(n_split, tl.int64) * T
    offs = 4 * field + tl.cast(split, tl.int64) * T + offs_t
    tl.store(partials_ptr + offs, w, mask=mask)
    tl.store(partials_ptr + field + offs, q, mask=mask)
    tl.store(partials_ptr + 2 * field + offs, r, mask=mask)


@triton.jit
def finish_statistics(
    statistics_ptr, offs_t, mask_t, T, n, rest, u, w, q, r, log_sum, valid, factor
):
    """Into statistics [4, T], in the order of STATISTICS; zeros and NaN as in `merge_kernel`."""
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
