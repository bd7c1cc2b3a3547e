"""Partial sums of the rows of h W^T + b, from plain pointers: any strides, any sizes, any GPU.

T tokens, D hidden, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LOG2E, LOWEST, add_bias, cap, dot, inverse_temperature, order
from .row_sum_functions import empty_sums, store_sums, update_statistics, update_sums
from .statistics_functions import store_statistics


@triton.jit(do_not_specialize=["stride_temperature", "T", "n_split"])
def forward_pointer_kernel(
    hidden_ptr,  # of the valid rows, as temperature
    weight_ptr,
    bias_ptr,
    temperature_ptr,
    index_ptr,  # [T], the number of each of these rows
    number_ptr,
    partials_ptr,  # [4, S, T]; with statistics [9, S, T]
    logits_ptr,  # [T, V], without bias
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_temperature,
    T,
    D,
    V,
    n_split,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE_LOGITS: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """One program per block of rows and split of TILES blocks of columns."""
    n_rows = tl.load(number_ptr)
    block, split = order(tl.program_id(0), tl.cdiv(T, BLOCK_T), n_split, GROUP_T)
    if block * BLOCK_T >= n_rows:
        return
    offs_t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    # Rows and columns past the end repeat the last one, so that loads need no mask. They are
    # neither stored nor summed.
    rows = tl.minimum(offs_t, n_rows - 1).to(tl.int64)
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_ht + offs_d.to(tl.int64)[None, :] * stride_hd
    weight_offs = offs_d.to(tl.int64)[:, None] * stride_wd
    scale = LOG2E * inverse_temperature(
        temperature_ptr, stride_temperature, offs_t, offs_t < n_rows, HAS_TEMPERATURE
    )
    m, n, s, u, w, q, r, mean, first = empty_sums(BLOCK_T)

    for tile in range(TILES):
        offs_v = (split * TILES + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        columns = tl.minimum(offs_v, V - 1).to(tl.int64)
        a_ptrs = hidden_ptrs
        b_ptrs = weight_ptr + columns[None, :] * stride_wv + weight_offs
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for start_d in range(0, D, BLOCK_D):
            if EVEN_D:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs)
            else:
                inside = offs_d < D - start_d
                a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
            acc = dot(a, b, acc, UPCAST)
            a_ptrs += BLOCK_D * stride_hd
            b_ptrs += BLOCK_D * stride_wd

        if STORE_LOGITS:
            inside = (offs_t < n_rows)[:, None] & (offs_v < V)[None, :]
            number = tl.load(index_ptr + offs_t, mask=offs_t < n_rows, other=0).to(tl.int64)
            ptrs = logits_ptr + number[:, None] * V + offs_v[None, :]
            tl.store(ptrs, acc, mask=inside)
        z = cap(add_bias(acc, bias_ptr, offs_v, V, HAS_BIAS), softcap, HAS_SOFTCAP)
        z = tl.where((offs_v < V)[None, :], z, LOWEST)
        if STATISTICS:
            m, n, s, u, w, q, r, mean, first = update_statistics(
                m, n, s, u, w, q, r, mean, first, z, scale, offs_v, V
            )
        else:
            m, n, s, u = update_sums(m, n, s, u, z, scale)

    store_sums(partials_ptr, split, n_split, offs_t, n_rows, T, m, n, s, u)
    if STATISTICS:
        store_statistics(partials_ptr, split, n_split, offs_t, n_rows, T, w, q, r, mean, first)
