"""From a tile of logits to a tile of dz, the gradient with respect to the logits h W^T + b.

dz is computed in fp32 and rounded once to the dtype of the inputs. The gradient of the bias is
summed before that rounding, in fp32, by blocks of rows.

C compact rows, V vocabulary.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LOG2E, tanh

# The least log p: exp of less is 0, and a finite log p times 0 is 0, whatever the logit.
LEAST_LOGPROB = tl.constexpr(-1e4)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to 1e-7 of its value."""
    p = x * (1.0 / 40320.0) + (1.0 / 5040.0)
    p = p * x + (1.0 / 720.0)
    p = p * x + (1.0 / 120.0)
    p = p * x + (1.0 / 24.0)
    p = p * x + (1.0 / 6.0)
    p = p * x + 0.5
    # A NaN takes the second branch, and stays.
    return tl.where(x > -0.5, x + x * x * p, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _slope(x):
    """The derivative of tanh, 1 - tanh^2, to 4e-7 of its value."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _logprob(z, peak, inverse, log_sum):
    """log p of capped logits. A NaN passes both clamps."""
    logp = (z - peak) * inverse - log_sum
    return tl.where(logp > 0.0, 0.0, tl.where(logp < LEAST_LOGPROB, LEAST_LOGPROB, logp))


@triton.jit
def target_gradient(
    z,  # [BLOCK_C, BLOCK_V] logits, without the bias where it is given
    offs_c,
    offs_v,
    n_rows,
    fields_ptr,
    target_ptr,
    bias_ptr,
    stop,
    capacity,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Each row's target, and dz there if the tile has it. With rest = g_logsumexp - g_entropy H,

        dz = p (rest - g_entropy log p) - g_logprob expm1(log p)

    which has all its digits when p is near 1. The target's logit is taken from the tile: only then
    is its difference from forward's maximum, which came from the same sum, exact.
    """
    mask_c = offs_c < n_rows
    target = tl.load(target_ptr + offs_c, mask=mask_c, other=-1)
    z = tl.sum(tl.where(offs_v[None, :] == target[:, None], z, 0.0), 1)
    if HAS_BIAS:
        inside = (target >= 0) & (target < stop)
        z += tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
    slope = tl.full(target.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        slope = _slope(z / softcap)
        z = softcap * tanh(z / softcap)
    fields_ptr += offs_c
    peak = tl.load(fields_ptr, mask=mask_c, other=0.0)
    inverse = tl.load(fields_ptr + capacity, mask=mask_c, other=0.0)
    log_sum = tl.load(fields_ptr + 2 * capacity, mask=mask_c, other=0.0)
    g_logprob = tl.load(fields_ptr + 3 * capacity, mask=mask_c, other=0.0)
    g_entropy = tl.load(fields_ptr + 4 * capacity, mask=mask_c, other=0.0)
    rest = tl.load(fields_ptr + 5 * capacity, mask=mask_c, other=0.0)
    logp = _logprob(z, peak, inverse, log_sum)
    dz = tl.exp2(logp * LOG2E) * (rest - g_entropy * logp) - g_logprob * expm1(logp)
    return target, slope * dz


@triton.jit
def store_gradient(
    z,  # [BLOCK_C, BLOCK_V] logits with bias
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
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
):
    """Stores dz = p (rest - g_logprob - g_entropy log p), and dz_target at each row's target."""
    mask_c = offs_c < n_rows
    mask_v = offs_v < stop
    fields_ptr += offs_c
    peak = tl.load(fields_ptr, mask=mask_c, other=0.0)
    inverse = tl.load(fields_ptr + capacity, mask=mask_c, other=0.0)
    log_sum = tl.load(fields_ptr + 2 * capacity, mask=mask_c, other=0.0)
    g_logprob = tl.load(fields_ptr + 3 * capacity, mask=mask_c, other=0.0)
    factor = tl.load(fields_ptr + 5 * capacity, mask=mask_c, other=0.0) - g_logprob

    slope = 1.0
    if HAS_SOFTCAP:
        slope = _slope(z / softcap)
        z = softcap * tanh(z / softcap)
    logp = _logprob(z, peak[:, None], inverse[:, None], log_sum[:, None])
    dz = tl.exp2(logp * LOG2E)
    if HAS_ENTROPY:
        g_entropy = tl.load(fields_ptr + 4 * capacity, mask=mask_c, other=0.0)
        dz *= factor[:, None] - g_entropy[:, None] * logp
    else:
        dz *= factor[:, None]
    if HAS_SOFTCAP:
        dz *= slope
    dz = tl.where(offs_v[None, :] == target[:, None], dz_target[:, None], dz)

    mask = mask_c[:, None] & mask_v[None, :]
    offs_n = offs_v - start
    dz_ptrs = dz_ptr + offs_c.to(tl.int64)[:, None] * stride_dz + offs_n[None, :]
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if NEEDS_BIAS:
        partial = tl.sum(tl.where(mask, dz, 0.0), 0)
        partial_ptrs = bias_partials_ptr + block.to(tl.int64) * stride_dz + offs_n
        tl.store(partial_ptrs, partial, mask=mask_v)
