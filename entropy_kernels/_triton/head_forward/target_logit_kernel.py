"""The logit of each row's target, bit for bit as in the tiles of all logits.

A block of rows is multiplied with the gathered weights of its own targets, in steps of the tiles'
depth. The diagonal is the result; the cost is BLOCK_T / V of the head's product. Inside the tiles
it would cost three more instructions per element. A plain dot product would sum in another order:
where the target is the maximum, its log-probability would lose all digits.

T tokens, D hidden, V vocabulary.
"""

import triton
import triton.language as tl

from ..common.logit_functions import cap, dot


@triton.jit
def target_logit_kernel(
    hidden_ptr,  # of the valid rows, as target
    weight_ptr,
    bias_ptr,
    target_ptr,  # [T]
    number_ptr,
    out_ptr,  # [T]
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    D,
    V,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Capped, fp32. A target outside the vocabulary takes the nearest."""
    n_rows = tl.load(number_ptr)
    if tl.program_id(0) * BLOCK_T >= n_rows:
        return
    block_t = tl.arange(0, BLOCK_T)
    offs_t = tl.program_id(0) * BLOCK_T + block_t
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < n_rows
    target = tl.load(target_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.minimum(tl.maximum(target, 0), V - 1)
    step_d = offs_d.to(tl.int64)
    a_ptrs = hidden_ptr + offs_t.to(tl.int64)[:, None] * stride_ht + step_d[None, :] * stride_hd
    b_ptrs = weight_ptr + target[None, :] * stride_wv + step_d[:, None] * stride_wd
    acc = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        inside = offs_d < D - start_d
        a = tl.load(a_ptrs, mask=mask_t[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_t[None, :] & inside[:, None], other=0.0)
        acc = dot(a, b, acc, UPCAST)
        a_ptrs += BLOCK_D * stride_hd
        b_ptrs += BLOCK_D * stride_wd
    z = tl.sum(tl.where(block_t[:, None] == block_t[None, :], acc, 0.0), 1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + target, mask=mask_t, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_t, cap(z, softcap, HAS_SOFTCAP), mask=mask_t)
