"""Statistics of rows of logits: summed tile by tile, kept per vocabulary split, merged at the end.

Relative to the largest logit m so far, four numbers a row, in fp32 and units of log2:

    n = how many columns hold m,  s = sum 2^d over the others,  u = sum d 2^d,
    d_j = (z_j - m) log2(e) / temperature

When m grows, all that came before moves by `shift` = d of the old maximum: s <- 2^shift (s + n),
u <- 2^shift (u + (s + n) shift), n <- 0. The maximum's own 1 never enters s, so the entropy

    H = log1p(s + n - 1) - ln(2) u / (s + n)

keeps its digits when it is 1e-9: neither term is negative. On request there are three numbers more
(moments.py).

T tokens, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LN2, LOG2E, LOWEST, LOWEST_EXPONENT, log1p
from .statistics_functions import finish_moments, moments_of_tile, moved_moments


@triton.jit
def _moved(m, n, s, u, scale, top):
    """(n, s, u) of columns whose maximum was m, relative to top >= m."""
    shift = (m - top) * scale
    a = tl.exp2(shift)
    total = s + n
    stays = m == top
    u = a * (u + total * tl.maximum(shift, LOWEST_EXPONENT))
    return tl.where(stays, n, 0.0), tl.where(stays, s, a * total), u


@triton.jit
def of_tile(z, top, scale):
    """(n, s, u) of a tile z [T, V] relative to top [T], at least its maximum.

    Columns to leave out hold LOWEST. A NaN or an infinity makes s NaN: no maximum sees a NaN.
    """
    d = (z - top[:, None]) * scale[:, None]
    e = tl.exp2(d)
    total = tl.sum(e, 1)
    s = tl.sum(tl.where(d == 0.0, 0.0, e), 1)
    # d of a logit of -inf would make 0 * -inf; e is NaN where d was.
    u = tl.sum(e * tl.maximum(d, LOWEST_EXPONENT), 1)
    return tl.floor(total - s + 0.5), s, u


@triton.jit
def update(m, n, s, u, z, scale):
    """The statistics [T] with one more tile of columns."""
    top = tl.maximum(m, tl.max(z, 1))
    n, s, u = _moved(m, n, s, u, scale, top)
    tile_n, tile_s, tile_u = of_tile(z, top, scale)
    return top, n + tile_n, s + tile_s, u + tile_u


@triton.jit
def update_moments(m, n, s, u, w, q, r, z, scale):
    """The statistics and moments [T] with one more tile of columns."""
    top = tl.maximum(m, tl.max(z, 1))
    w, q, r = moved_moments(m, n, s, u, w, q, r, scale, top)
    n, s, u = _moved(m, n, s, u, scale, top)
    tile_n, tile_s, tile_u = of_tile(z, top, scale)
    tile_w, tile_q, tile_r = moments_of_tile(z, top, scale)
    return top, n + tile_n, s + tile_s, u + tile_u, w + tile_w, q + tile_q, r + tile_r


@triton.jit
def store(partials_ptr, split, n_split, offs_t, end_t, T, m, n, s, u):
    """Into fields 0 to 3 of partials [4 or 7, S, T], rows before end_t."""
    mask = offs_t < end_t
    offs = tl.cast(split, tl.int64) * T + offs_t
    field = tl.cast(n_split, tl.int64) * T
    tl.store(partials_ptr + offs, m, mask=mask)
    tl.store(partials_ptr + field + offs, n, mask=mask)
    tl.store(partials_ptr + 2 * field + offs, s, mask=mask)
    tl.store(partials_ptr + 3 * field + offs, u, mask=mask)


@triton.jit
def merge(
    partials_ptr,  # [4, S, T]; with moments [7, S, T]
    target_logit_ptr,  # [T]
    target_ptr,  # [T]
    temperature_ptr,
    logprob_ptr,  # [T], as the four that follow
    entropy_ptr,
    logsumexp_ptr,
    max_ptr,
    log_sum_ptr,
    moments_ptr,  # [4, T]
    stride_temperature,
    first_t,
    end_t,
    T,
    V,
    n_split,
    ignore_index,
    HAS_TEMPERATURE: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Natural units; zeros where the target is ignored, NaN where a row has no answer."""
    offs_t = first_t + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end_t
    temperature = tl.full([BLOCK_T], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        offs = offs_t.to(tl.int64) * stride_temperature
        temperature = tl.load(temperature_ptr + offs, mask=mask_t, other=1.0)
    scale = LOG2E / temperature
    m = tl.full([BLOCK_T], LOWEST, tl.float32)
    n = tl.zeros([BLOCK_T], tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    w = tl.zeros([BLOCK_T], tl.float32)
    q = tl.zeros([BLOCK_T], tl.float32)
    r = tl.zeros([BLOCK_T], tl.float32)
    field = tl.cast(n_split, tl.int64) * T

    for start in range(0, n_split, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_split)[:, None] & mask_t[None, :]
        ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * T + offs_t[None, :]
        m_ST = tl.load(ptrs, mask=mask, other=LOWEST)
        n_ST = tl.load(ptrs + field, mask=mask, other=0.0)
        s_ST = tl.load(ptrs + 2 * field, mask=mask, other=0.0)
        u_ST = tl.load(ptrs + 3 * field, mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(m_ST, 0))
        if MOMENTS:
            w_ST = tl.load(ptrs + 4 * field, mask=mask, other=0.0)
            q_ST = tl.load(ptrs + 5 * field, mask=mask, other=0.0)
            r_ST = tl.load(ptrs + 6 * field, mask=mask, other=0.0)
            w_ST, q_ST, r_ST = moved_moments(
                m_ST, n_ST, s_ST, u_ST, w_ST, q_ST, r_ST, scale[None, :], top[None, :]
            )
            w, q, r = moved_moments(m, n, s, u, w, q, r, scale, top)
            w += tl.sum(w_ST, 0)
            q += tl.sum(q_ST, 0)
            r += tl.sum(r_ST, 0)
        n_ST, s_ST, u_ST = _moved(m_ST, n_ST, s_ST, u_ST, scale[None, :], top[None, :])
        n, s, u = _moved(m, n, s, u, scale, top)
        n += tl.sum(n_ST, 0)
        s += tl.sum(s_ST, 0)
        u += tl.sum(u_ST, 0)
        m = top

    rest = s + (n - 1.0)
    # Of a row of -inf throughout, which has no maximum either.
    rest = tl.where(rest < 0.0, 0.0, rest)
    log_sum = log1p(rest)
    entropy = log_sum - LN2 * u / (1.0 + rest)
    logprob = (tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0) - m) / temperature
    # The target's logit was summed in another order: it may exceed the maximum by a rounding.
    logprob = tl.where(logprob > 0.0, 0.0, logprob) - log_sum
    logsumexp = m / temperature + log_sum

    target = tl.load(target_ptr + offs_t, mask=mask_t, other=0)
    valid = (m > LOWEST) & (temperature > 0.0) & (target >= 0) & (target < V) & (rest == rest)
    # 0 for ignored rows, 1 for others, NaN for those without an answer.
    factor = tl.where(valid, 1.0, float("nan"))
    kept = target != ignore_index
    tl.store(logprob_ptr + offs_t, tl.where(kept, logprob * factor, 0.0), mask=mask_t)
    tl.store(entropy_ptr + offs_t, tl.where(kept, entropy * factor, 0.0), mask=mask_t)
    tl.store(logsumexp_ptr + offs_t, tl.where(kept, logsumexp * factor, 0.0), mask=mask_t)
    tl.store(max_ptr + offs_t, tl.where(kept, m * factor, 0.0), mask=mask_t)
    tl.store(log_sum_ptr + offs_t, tl.where(kept, log_sum * factor, 0.0), mask=mask_t)
    if MOMENTS:
        finish_moments(moments_ptr, offs_t, mask_t, T, n, rest, u, w, q, r, log_sum, kept, factor)
