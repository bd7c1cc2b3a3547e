"""Copies of the rows that have a target.

T tokens, D hidden.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_temperature", "T"])
def valid_rows_kernel(
    hidden_ptr,
    target_ptr,  # [T]
    temperature_ptr,
    index_ptr,  # int32 [T], the number of each row
    number_ptr,
    out_hidden_ptr,  # [T, D]
    out_target_ptr,  # [T]
    out_temperature_ptr,  # [T]
    stride_ht,
    stride_hd,
    stride_temperature,
    T,
    D,
    HAS_TEMPERATURES: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per BLOCK_T rows, which ends at once where none is left.

    PADDING zero rows follow, for a block of the last rows to read.
    """
    number = tl.load(number_ptr)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T >= number + PADDING:
        return
    mask_t = offs_t < number
    mask_out = offs_t < tl.minimum(number + PADDING, T)
    row = tl.load(index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.load(target_ptr + row, mask=mask_t, other=0)
    tl.store(out_target_ptr + offs_t, target, mask=mask_t)
    if HAS_TEMPERATURES:
        temperature = tl.load(temperature_ptr + row * stride_temperature, mask=mask_t, other=1.0)
        tl.store(out_temperature_ptr + offs_t, temperature, mask=mask_t)
    offs_d = tl.arange(0, BLOCK_D)
    in_ptrs = hidden_ptr + row[:, None] * stride_ht + offs_d.to(tl.int64)[None, :] * stride_hd
    out_ptrs = out_hidden_ptr + offs_t.to(tl.int64)[:, None] * D + offs_d[None, :]
    for start_d in range(0, D, BLOCK_D):
        mask_d = (offs_d < D - start_d)[None, :]
        x = tl.load(in_ptrs, mask=mask_t[:, None] & mask_d, other=0.0)
        tl.store(out_ptrs, x, mask=mask_out[:, None] & mask_d)
        in_ptrs += BLOCK_D * stride_hd
        out_ptrs += BLOCK_D
