"""Device functions of the head's kernels: products of tiles, and their way to logits.

T tokens, D hidden, V vocabulary.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below any logit, yet finite: its differences are finite too, also in units of log2.
LOWEST = tl.constexpr(-1e30)
# exp2 of less is subnormal, and nothing to a sum that holds a 1. With exponents clamped to this,
# exponent times exp2 is finite, whatever the logit.
LOWEST_EXPONENT = tl.constexpr(-125.0)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b in fp32, without TF32. The interpreter needs operands upcast to fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh to 2e-7 of its value. Near 0, where 1 - exp(-2x) would cancel, an odd polynomial."""
    y = tl.abs(x)
    e = tl.exp2(y * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    q = tl.minimum(y, 1.0)
    q = q * q
    p = 0.020805388 - 0.0059058721 * q
    p = 0.133319583 + q * (p * q - 0.0537866847)
    near = x + x * (q * (p * q - 0.333332993))
    # A NaN takes the second branch, and stays.
    return tl.where(y > 0.6, tl.where(x < 0, -far, far), near)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, with all digits near 0."""
    y = 1.0 + x
    # y - 1 is exact. The ratio repairs what rounding took from y.
    ratio = tl.where(y == 1.0, 1.0, x / tl.where(y == 1.0, 1.0, y - 1.0))
    return tl.where(y == 1.0, x, tl.log(y) * ratio)


@triton.jit
def add_bias(z, bias_ptr, offs_v, V, HAS_BIAS: tl.constexpr):
    """z [T, V] + bias [V], contiguous; columns past V get no bias."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def cap(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap)."""
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def inverse_temperature(
    temperature_ptr, stride_temperature, offs_t, mask_t, HAS_TEMPERATURE: tl.constexpr
):
    """1 / temperature of each row, fp32. The stride is 0 where all rows share one temperature."""
    if HAS_TEMPERATURE:
        offs = offs_t.to(tl.int64) * stride_temperature
        inverse = 1.0 / tl.load(temperature_ptr + offs, mask=mask_t, other=1.0)
    else:
        inverse = tl.full(offs_t.shape, 1.0, tl.float32)
    return inverse


@triton.jit
def order(unit, n_blocks, n_split, GROUP_T: tl.constexpr):
    """(row block, split) of a unit of work. GROUP_T row blocks share the columns of a split."""
    per_group = GROUP_T * n_split
    first = unit // per_group * GROUP_T
    size = min(n_blocks - first, GROUP_T)
    within = unit % per_group
    return first + within % size, within // size
