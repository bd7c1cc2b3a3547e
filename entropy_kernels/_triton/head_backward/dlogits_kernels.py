"""Kernels of dz, the gradient with respect to the logits h W^T + b, one tile at a time.

Logits are recomputed with fp32 accumulators, or read where forward has stored them. With HAS_FIRST
the kernels that recompute leave the first rows to the kernel that reads.

C compact rows, D hidden, V vocabulary.
"""

import triton
import triton.language as tl

from ..common.logit_functions import add_bias, dot, order
from .dlogits_functions import store_gradient, target_gradient


@triton.jit(do_not_specialize=["capacity"])
def dlogits_pointer_kernel(
    hidden_ptr,  # [C, D]
    weight_ptr,
    bias_ptr,
    fields_ptr,  # [FIELDS, C]
    target_ptr,
    first_ptr,
    number_ptr,
    dz_ptr,
    bias_partials_ptr,
    stride_wv,
    stride_wd,
    stride_dz,
    capacity,
    D,
    start,
    stop,
    softcap,
    HAS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
):
    """One program per tile, from plain pointers: any strides, any GPU."""
    n_rows = tl.minimum(tl.load(number_ptr), capacity)
    blocks_v = tl.cdiv(stop - start, BLOCK_V)
    block, block_v = order(tl.program_id(0), tl.cdiv(capacity, BLOCK_C), blocks_v, GROUP_C)
    if HAS_FIRST:
        block += tl.cdiv(tl.load(first_ptr), BLOCK_C)
    if block * BLOCK_C >= n_rows:
        return
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_v = start + block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    # Rows and columns past the end repeat the last one, so that loads need no mask. None is stored.
    rows = tl.minimum(offs_c, capacity - 1).to(tl.int64)
    columns = tl.minimum(offs_v, stop - 1).to(tl.int64)
    a_ptrs = hidden_ptr + rows[:, None] * D + offs_d[None, :]
    b_ptrs = weight_ptr + columns[None, :] * stride_wv + offs_d.to(tl.int64)[:, None] * stride_wd
    acc = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = offs_d < D - start_d
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        acc = dot(a, b, acc, UPCAST)
        a_ptrs += BLOCK_D
        b_ptrs += BLOCK_D * stride_wd
    target, dz_target = target_gradient(
        acc,
        offs_c,
        offs_v,
        n_rows,
        fields_ptr,
        target_ptr,
        bias_ptr,
        stop,
        capacity,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    store_gradient(
        add_bias(acc, bias_ptr, offs_v, stop, HAS_BIAS),
        target,
        dz_target,
        block,
        offs_c,
        offs_v,
        n_rows,
        fields_ptr,
        dz_ptr,
        bias_partials_ptr,
        stride_dz,
        capacity,
        start,
        stop,
        softcap,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        NEEDS_BIAS,
    )


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["capacity"])
def dlogits_tma_kernel(
    hidden_desc,  # blocks of [BLOCK_C, BLOCK_D]
    weight_desc,  # blocks of [BLOCK_V, BLOCK_D]
    bias_ptr,
    fields_ptr,  # [FIELDS, C]
    target_ptr,
    first_ptr,
    number_ptr,
    dz_ptr,
    bias_partials_ptr,
    stride_dz,
    capacity,
    D,
    start,
    stop,
    softcap,
    HAS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Each program takes every num_programs-th tile of the rows that are there.

    The epilogue takes a quarter of the columns at a time: all at once need too many registers.
    """
    n_rows = tl.minimum(tl.load(number_ptr), capacity)
    blocks_c = tl.cdiv(n_rows, BLOCK_C)
    blocks_v = tl.cdiv(stop - start, BLOCK_V)
    first_block = 0
    if HAS_FIRST:
        first_block = tl.cdiv(tl.load(first_ptr), BLOCK_C)
        blocks_c -= first_block
    for tile in tl.range(
        tl.program_id(0), blocks_c * blocks_v, tl.num_programs(0), flatten=FLATTEN
    ):
        block, block_v = order(tile, blocks_c, blocks_v, GROUP_C)
        if HAS_FIRST:
            block += first_block
        start_c = block * BLOCK_C
        start_v = start + block_v * BLOCK_V
        acc = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
        for start_d in range(0, D, BLOCK_D):
            a = hidden_desc.load([start_c, start_d])
            b = weight_desc.load([start_v, start_d])
            acc = dot(a, b.T, acc, UPCAST)
        offs_c = start_c + tl.arange(0, BLOCK_C)
        target, dz_target = target_gradient(
            acc,
            offs_c,
            start_v + tl.arange(0, BLOCK_V),
            n_rows,
            fields_ptr,
            target_ptr,
            bias_ptr,
            stop,
            capacity,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        left, right = _halves(acc)
        parts = _halves(left) + _halves(right)
        for i in tl.static_range(4):
            offs_v = start_v + i * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
            store_gradient(
                add_bias(parts[i], bias_ptr, offs_v, stop, HAS_BIAS),
                target,
                dz_target,
                block,
                offs_c,
                offs_v,
                n_rows,
                fields_ptr,
                dz_ptr,
                bias_partials_ptr,
                stride_dz,
                capacity,
                start,
                stop,
                softcap,
                HAS_SOFTCAP,
                HAS_ENTROPY,
                NEEDS_BIAS,
            )


@triton.jit(do_not_specialize=["capacity"])
def dlogits_read_kernel(
    logits_ptr,  # fp32 [rows, V], without bias
    index_ptr,  # [C], the row of each
    bias_ptr,
    fields_ptr,  # [FIELDS, C]
    target_ptr,
    number_ptr,
    dz_ptr,
    bias_partials_ptr,
    stride_dz,
    capacity,
    V,
    start,
    stop,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per tile, from the logits that forward stored."""
    n_rows = tl.minimum(tl.load(number_ptr), capacity)
    blocks_v = tl.cdiv(stop - start, BLOCK_V)
    block = tl.program_id(0) // blocks_v
    if block * BLOCK_C >= n_rows:
        return
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_v = start + tl.program_id(0) % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.load(index_ptr + offs_c, mask=offs_c < n_rows, other=0).to(tl.int64)
    mask = (offs_c < n_rows)[:, None] & (offs_v < stop)[None, :]
    z = tl.load(logits_ptr + row[:, None] * V + offs_v[None, :], mask=mask, other=0.0)
    target, dz_target = target_gradient(
        z,
        offs_c,
        offs_v,
        n_rows,
        fields_ptr,
        target_ptr,
        bias_ptr,
        stop,
        capacity,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    store_gradient(
        add_bias(z, bias_ptr, offs_v, stop, HAS_BIAS),
        target,
        dz_target,
        block,
        offs_c,
        offs_v,
        n_rows,
        fields_ptr,
        dz_ptr,
        bias_partials_ptr,
        stride_dz,
        capacity,
        start,
        stop,
        softcap,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        NEEDS_BIAS,
    )
