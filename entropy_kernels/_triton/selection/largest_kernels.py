"""The values above a threshold, and the first of those equal to it."""

import triton
import triton.language as tl

from .key_functions import load_keys, sort_keys


@triton.jit
def count_ties_kernel(
    bits_ptr,
    mask_ptr,
    threshold_ptr,
    counts_ptr,
    n,
    HAS_MASK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    threshold = sort_keys(tl.load(threshold_ptr))
    counts = tl.zeros((BLOCK,), tl.int64)
    for i in range(BLOCKS):
        offs = (program * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        key, valid = load_keys(bits_ptr, mask_ptr, offs, n, HAS_MASK)
        counts += (valid & (key == threshold)).to(tl.int64)
    tl.store(counts_ptr + program, tl.sum(counts))


@triton.jit
def write_largest_kernel(
    bits_ptr,
    mask_ptr,
    threshold_ptr,
    quota_ptr,
    counts_ptr,
    selected_ptr,
    n,
    HAS_MASK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    threshold = sort_keys(tl.load(threshold_ptr))
    others = tl.arange(0, MAX_PROGRAMS)
    quota = tl.load(quota_ptr)
    quota -= tl.sum(tl.load(counts_ptr + others, mask=others < program, other=0))
    for i in range(BLOCKS):
        offs = (program * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        key, valid = load_keys(bits_ptr, mask_ptr, offs, n, HAS_MASK)
        equal = (valid & (key == threshold)).to(tl.int32)
        within = (equal != 0) & (tl.cumsum(equal, 0) <= quota)
        selected = (valid & (key > threshold)) | within
        tl.store(selected_ptr + offs, selected.to(tl.uint8), mask=offs < n)
        quota -= tl.sum(equal)
