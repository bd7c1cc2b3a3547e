"""The histogram of a digit of the keys, and the digit of the k-th largest."""

import triton
import triton.language as tl

from .key_functions import DENSE_BITS, INFINITY, SIGN, load_keys


@triton.jit
def histogram_kernel(
    bits_ptr,
    mask_ptr,
    prefix_ptr,
    counts_ptr,
    n,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    PREFIX_BITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BINS: tl.constexpr = 1 << BITS
    DENSE: tl.constexpr = BITS <= DENSE_BITS
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    prefix = tl.load(prefix_ptr).to(tl.int32)
    if DENSE:
        bins = tl.arange(0, BINS)
        counts = tl.zeros((BINS,), tl.int32)
    for i in range(BLOCKS):
        offs = (first_block + i) * BLOCK + tl.arange(0, BLOCK)
        key, counted = load_keys(bits_ptr, mask_ptr, offs, n, HAS_MASK)
        key ^= SIGN
        if PREFIX_BITS > 0:
            head = (key >> (32 - PREFIX_BITS)) & ((1 << PREFIX_BITS) - 1)
            counted &= head == prefix
        digit = (key >> SHIFT) & (BINS - 1)
        if DENSE:
            # tl.histogram takes as long for few values as for many, and in Triton 3.6 longer than
            # anything else here; later passes count few.
            if tl.sum(counted.to(tl.int32)) > BLOCK // 4:
                counts += tl.histogram(digit, BINS, mask=counted)
            else:
                one = tl.full((BLOCK,), 1, tl.int64)
                tl.atomic_add(counts_ptr + digit, one, mask=counted, sem="relaxed")
        else:
            one = tl.full((BLOCK,), 1, tl.int64)
            tl.atomic_add(counts_ptr + digit, one, mask=counted, sem="relaxed")
    if DENSE:
        tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def pick_kernel(
    counts_ptr,
    local_ptr,
    prefix_ptr,
    remaining_ptr,
    new_prefix_ptr,
    new_remaining_ptr,
    equal_ptr,
    value_ptr,
    share_bits,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
):
    BINS: tl.constexpr = 1 << BITS
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins)
    n = tl.sum(counts)
    if FIRST:
        # fp64 as in `_radix.selected_count`; a launch would round a float to fp32.
        share = share_bits.to(tl.float64, bitcast=True)
        k = tl.ceil(n.to(tl.float64) * share).to(tl.int64)
        k = tl.minimum(tl.maximum(k, 1), n)
    else:
        k = tl.load(remaining_ptr)
    from_top = n - tl.cumsum(counts, 0) + counts
    digit = BINS - 1 - tl.sum((from_top < k).to(tl.int32))
    above = tl.max(tl.where(from_top < k, from_top, 0))
    equal = tl.sum(tl.where(bins == digit, tl.load(local_ptr + bins), 0))
    prefix = (tl.load(prefix_ptr) << BITS) | digit.to(tl.int64)
    ordered = ((prefix << SHIFT) + SIGN).to(tl.int32)
    bits = tl.where(n > 0, ordered ^ ((ordered >> 31) & ~SIGN), INFINITY)
    tl.store(new_prefix_ptr, prefix)
    tl.store(new_remaining_ptr, k - above)
    tl.store(equal_ptr, equal)
    tl.store(value_ptr, bits.to(tl.float32, bitcast=True))
