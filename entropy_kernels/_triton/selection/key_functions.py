"""Keys of fp32 values: integers of the same order."""

import triton
import triton.language as tl

SIGN = tl.constexpr(-(1 << 31))
INFINITY = tl.constexpr(0x7F800000)  # the bits of +inf; a NaN's are above, but for its sign
# A histogram of more bins would not fit a program's registers and shared memory.
DENSE_BITS = tl.constexpr(11)


@triton.jit
def sort_keys(bits):
    """int32 that order as the fp32 of these bits: NaN on top, -0 equal to +0, never INT32_MIN."""
    bits = tl.where(bits == SIGN, 0, bits)
    key = bits ^ ((bits >> 31) & ~SIGN)
    return tl.where((bits & ~SIGN) > INFINITY, ~SIGN, key)


@triton.jit
def load_keys(bits_ptr, mask_ptr, offs, n, HAS_MASK: tl.constexpr):
    """The keys at `offs`, and which of them are valid."""
    valid = offs < n
    # Loading only what is valid would load one value at a time.
    key = sort_keys(tl.load(bits_ptr + offs, mask=valid, other=0))
    if HAS_MASK:
        valid &= tl.load(mask_ptr + offs, mask=valid, other=0) != 0
    return key, valid
