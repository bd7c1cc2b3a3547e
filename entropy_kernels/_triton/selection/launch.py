"""The histogram of a digit of the keys of `_radix`, and the digit with the k-th largest, on a GPU.

Everything is an integer, so the counts are the same whatever order the programs run in. A pass is
one launch over the values and one program over the counts; the host waits for neither.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device

BLOCK = 2048
# Programs that a launch has at most: each goes over consecutive blocks.
MAX_PROGRAMS = 1024
SIGN = tl.constexpr(-(1 << 31))
INFINITY = tl.constexpr(0x7F800000)  # the bits of +inf; a NaN's are above, but for its sign
# A histogram of more bins would not fit the registers and the shared memory of a program.
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
    # Loading only what the mask keeps would load one value at a time.
    key = sort_keys(tl.load(bits_ptr + offs, mask=valid, other=0))
    if HAS_MASK:
        valid &= tl.load(mask_ptr + offs, mask=valid, other=0) != 0
    return key, valid


@triton.jit
def _histogram_kernel(
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
def _pick_kernel(
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


def partition(n: int, block: int) -> tuple[int, int]:
    """How many programs share n values, and the consecutive blocks of each.

    The blocks are a power of two: kernels are compiled for a number of them.
    """
    blocks = triton.cdiv(n, block)
    each = triton.next_power_of_2(max(triton.cdiv(blocks, MAX_PROGRAMS), 1))
    return triton.cdiv(blocks, each), each


def radix_histogram(
    values: Tensor, mask: Tensor | None, prefix: Tensor, shift: int, bits: int, prefix_bits: int
) -> Tensor:
    """`_radix.radix_histogram`: int64 [1 << bits]. Reads every value once, writes no temporary."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    programs, blocks = partition(values.numel(), BLOCK)
    if programs == 0:
        return counts
    with device.on(values.device):
        _histogram_kernel[(programs,)](
            values.view(torch.int32),
            None if mask is None else mask.view(torch.uint8),
            prefix,
            counts,
            values.numel(),
            SHIFT=shift,
            BITS=bits,
            PREFIX_BITS=prefix_bits,
            HAS_MASK=mask is not None,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return counts


def radix_pick(
    counts: Tensor,
    local: Tensor,
    prefix: Tensor,
    remaining: Tensor | None,
    share: float,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_radix.radix_pick` for at most 2048 bins: one program."""
    bits = counts.numel().bit_length() - 1
    assert counts.numel() == 1 << bits
    assert bits <= DENSE_BITS.value
    new_prefix, new_remaining, equal = (torch.empty_like(prefix) for _ in range(3))
    value = torch.empty((), dtype=torch.float32, device=counts.device)
    with device.on(counts.device):
        _pick_kernel[(1,)](
            counts,
            local,
            prefix,
            remaining,
            new_prefix,
            new_remaining,
            equal,
            value,
            struct.unpack("<q", struct.pack("<d", share))[0],
            SHIFT=shift,
            BITS=bits,
            FIRST=remaining is None,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return new_prefix, new_remaining, equal, value
