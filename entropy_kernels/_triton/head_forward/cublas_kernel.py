"""Partial sums of rows of logits that a matrix product left in a workspace.

T tokens, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LOG2E, LOWEST, add_bias, cap, inverse_temperature
from .row_sum_functions import empty_sums, store_sums, update_statistics, update_sums
from .statistics_functions import store_statistics


@triton.jit(
    do_not_specialize=["stride_temperature", "first_t", "end_t", "T", "n_split", "ignore_index"]
)
def forward_cublas_kernel(
    logits_ptr,  # [rows, V], of tokens first_t and on; without bias, not capped
    bias_ptr,
    target_ptr,  # [T]
    temperature_ptr,
    partials_ptr,  # [4, S, T]; with statistics [9, S, T]
    target_logit_ptr,  # [T], capped
    stride_temperature,
    first_t,
    end_t,
    T,
    V,
    n_split,
    ignore_index,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program per block of rows and split of TILES blocks of columns; it skips ignored rows."""
    block = tl.program_id(0) // n_split
    split = tl.program_id(0) % n_split
    offs_t = first_t + block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end_t
    target = tl.load(target_ptr + offs_t, mask=mask_t, other=ignore_index)
    mask_t &= target != ignore_index
    if tl.max(mask_t.to(tl.int32), 0) == 0:
        return
    row_ptrs = logits_ptr + (offs_t - first_t).to(tl.int64) * V
    scale = LOG2E * inverse_temperature(
        temperature_ptr, stride_temperature, offs_t, mask_t, HAS_TEMPERATURE
    )
    m, n, s, u, w, q, r, mean, first = empty_sums(BLOCK_T)

    for tile in range(TILES):
        offs_v = (split * TILES + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = mask_t[:, None] & (offs_v < V)[None, :]
        z = tl.load(row_ptrs[:, None] + offs_v[None, :], mask=mask, other=0.0)
        z = cap(add_bias(z, bias_ptr, offs_v, V, HAS_BIAS), softcap, HAS_SOFTCAP)
        z = tl.where(mask, z, LOWEST)
        if STATISTICS:
            m, n, s, u, w, q, r, mean, first = update_statistics(
                m, n, s, u, w, q, r, mean, first, z, scale, offs_v, V
            )
        else:
            m, n, s, u = update_sums(m, n, s, u, z, scale)
    store_sums(partials_ptr, split, n_split, offs_t, end_t, T, m, n, s, u)
    if STATISTICS:
        store_statistics(partials_ptr, split, n_split, offs_t, end_t, T, w, q, r, mean, first)

    start_v = split * TILES * BLOCK_V
    here = mask_t & (target >= start_v) & (target < start_v + TILES * BLOCK_V) & (target < V)
    z = tl.load(row_ptrs + target, mask=here, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + target, mask=here, other=0.0).to(tl.float32)
    tl.store(target_logit_ptr + offs_t, cap(z, softcap, HAS_SOFTCAP), mask=here)
