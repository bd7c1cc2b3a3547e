"""Sums over rows of logits: tile by tile, one set per vocabulary split, merged at the end.

Four numbers per row, relative to the largest logit m so far, in fp32 and units of log2:

    n = how many columns hold m,  s = sum 2^d over the others,  u = sum d 2^d,
    d_j = (z_j - m) log2(e) / temperature

When m grows, all sums move by `shift`, which is d of the old maximum: s <- 2^shift (s + n),
u <- 2^shift (u + (s + n) shift), n <- 0. The maximum's own 1 never enters s. So the entropy

    H = log1p(s + n - 1) - ln(2) u / (s + n)

has all its digits even at 1e-9: neither term is negative. Statistics, on request, need five more
numbers (statistics_functions.py).

T tokens, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LOWEST, LOWEST_EXPONENT
from .statistics_functions import NOWHERE, logits_of_tile, moved_statistics, statistics_of_tile


@triton.jit
def empty_sums(BLOCK_T: tl.constexpr):
    """(m, n, s, u, w, q, r, mean, first) of no columns."""
    zero = tl.zeros([BLOCK_T], tl.float32)
    first = tl.full([BLOCK_T], NOWHERE, tl.int32)
    return tl.full([BLOCK_T], LOWEST, tl.float32), zero, zero, zero, zero, zero, zero, zero, first


@triton.jit
def moved_sums(m, n, s, u, scale, top):
    """(n, s, u) of columns whose maximum was m, relative to top >= m."""
    shift = (m - top) * scale
    a = tl.exp2(shift)
    total = s + n
    stays = m == top
    u = a * (u + total * tl.maximum(shift, LOWEST_EXPONENT))
    return tl.where(stays, n, 0.0), tl.where(stays, s, a * total), u


@triton.jit
def sums_of_tile(z, top, scale):
    """(n, s, u) of a tile z [T, V] relative to top [T], at least its maximum.

    Columns that are left out hold LOWEST. A NaN or an infinity makes s NaN: no maximum sees a NaN.
    """
    d = (z - top[:, None]) * scale[:, None]
    e = tl.exp2(d)
    total = tl.sum(e, 1)
    s = tl.sum(tl.where(d == 0.0, 0.0, e), 1)
    # Unclamped, a logit of -inf would give 0 * -inf. e is NaN where d is.
    u = tl.sum(e * tl.maximum(d, LOWEST_EXPONENT), 1)
    return tl.floor(total - s + 0.5), s, u


@triton.jit
def update_sums(m, n, s, u, z, scale):
    """The sums [T] with one more tile of columns."""
    top = tl.maximum(m, tl.max(z, 1))
    n, s, u = moved_sums(m, n, s, u, scale, top)
    tile_n, tile_s, tile_u = sums_of_tile(z, top, scale)
    return top, n + tile_n, s + tile_s, u + tile_u


@triton.jit
def update_statistics(m, n, s, u, w, q, r, mean, first, z, scale, offs_v, V):
    """The sums [T], also those behind the statistics, with one more tile of columns."""
    top = tl.maximum(m, tl.max(z, 1))
    tile_mean, tile_first = logits_of_tile(z, top, offs_v, V)
    mean += tile_mean
    # A column of an earlier tile stays where it ties.
    first = tl.minimum(tl.where(m == top, first, NOWHERE), tile_first)
    w, q, r = moved_statistics(m, n, s, u, w, q, r, scale, top)
    n, s, u = moved_sums(m, n, s, u, scale, top)
    tile_n, tile_s, tile_u = sums_of_tile(z, top, scale)
    tile_w, tile_q, tile_r = statistics_of_tile(z, top, scale)
    w, q, r = w + tile_w, q + tile_q, r + tile_r
    return top, n + tile_n, s + tile_s, u + tile_u, w, q, r, mean, first


@triton.jit
def store_sums(partials_ptr, split, n_split, offs_t, end_t, T, m, n, s, u):
    """Into fields 0 to 3 of partials [4 or 9, S, T], rows before end_t."""
    mask = offs_t < end_t
    offs = tl.cast(split, tl.int64) * T + offs_t
    field = tl.cast(n_split, tl.int64) * T
    tl.store(partials_ptr + offs, m, mask=mask)
    tl.store(partials_ptr + field + offs, n, mask=mask)
    tl.store(partials_ptr + 2 * field + offs, s, mask=mask)
    tl.store(partials_ptr + 3 * field + offs, u, mask=mask)
