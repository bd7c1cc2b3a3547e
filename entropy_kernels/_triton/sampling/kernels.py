"""Sums over rows of logits that a sampler has, and the entropies from them.

R rows, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LN2, LOG2E, LOWEST, inverse_temperature, log1p
from ..head_forward.row_sum_functions import empty_sums, moved_sums, store_sums, update_sums


@triton.jit(do_not_specialize=["stride_temperature", "R", "n_split", "tiles"])
def logit_sums_kernel(
    logits_ptr,  # [R, V]
    temperature_ptr,
    partials_ptr,  # fp32 [4, S, R]
    stride_r,
    stride_temperature,
    R,
    V,
    n_split,
    tiles,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row and split of `tiles` blocks of columns."""
    row = tl.program_id(0) // n_split + tl.arange(0, 1)
    split = tl.program_id(0) % n_split
    row_ptrs = logits_ptr + row.to(tl.int64) * stride_r
    scale = LOG2E * inverse_temperature(
        temperature_ptr, stride_temperature, row, row < R, HAS_TEMPERATURE
    )
    m, n, s, u, _, _, _, _, _ = empty_sums(1)
    for tile in range(tiles):
        offs_v = (split * tiles + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tl.load(
            row_ptrs[:, None] + offs_v[None, :], mask=(offs_v < V)[None, :], other=float("-inf")
        )
        m, n, s, u = update_sums(m, n, s, u, z.to(tl.float32), scale)
    store_sums(partials_ptr, split, n_split, row, R, R, m, n, s, u)


@triton.jit(do_not_specialize=["stride_temperature", "R", "n_split"])
def logit_entropy_kernel(
    partials_ptr,  # fp32 [4, S, R]
    temperature_ptr,
    entropy_ptr,  # fp32 [R]
    stride_temperature,
    R,
    n_split,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Nats; NaN for a row of -inf throughout, with a NaN or +inf, or without a temperature."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    inverse = inverse_temperature(
        temperature_ptr, stride_temperature, offs_r, mask_r, HAS_TEMPERATURE
    )
    scale = LOG2E * inverse
    m, n, s, u, _, _, _, _, _ = empty_sums(BLOCK_R)
    field = tl.cast(n_split, tl.int64) * R
    for start in range(0, n_split, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_split)[:, None] & mask_r[None, :]
        ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * R + offs_r[None, :]
        m_SR = tl.load(ptrs, mask=mask, other=LOWEST)
        n_SR = tl.load(ptrs + field, mask=mask, other=0.0)
        s_SR = tl.load(ptrs + 2 * field, mask=mask, other=0.0)
        u_SR = tl.load(ptrs + 3 * field, mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(m_SR, 0))
        n_SR, s_SR, u_SR = moved_sums(m_SR, n_SR, s_SR, u_SR, scale[None, :], top[None, :])
        n, s, u = moved_sums(m, n, s, u, scale, top)
        n += tl.sum(n_SR, 0)
        s += tl.sum(s_SR, 0)
        u += tl.sum(u_SR, 0)
        m = top
    rest = s + (n - 1.0)
    # A row of -inf throughout has no maximum, and a negative rest.
    rest = tl.where(rest < 0.0, 0.0, rest)
    entropy = log1p(rest) - LN2 * u / (1.0 + rest)
    defined = (m > LOWEST) & (rest == rest) & (inverse > 0.0) & (inverse < float("inf"))
    entropy = tl.where(defined, entropy, float("nan"))
    tl.store(entropy_ptr + offs_r, entropy, mask=mask_r)
