"""The values above a threshold, and the first of those equal to it."""

import triton
import triton.language as tl

from .key_functions import load_keys, sort_keys


@triton.jit
def largest_kernel(
    bits_ptr,
    mask_ptr,
    threshold_ptr,
    quota_ptr,
    counts_ptr,  # int64, one per program
    selected_ptr,
    n,
    HAS_MASK: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Counts the ties of each program; writes what is selected where all are COUNTED."""
    program = tl.program_id(0).to(tl.int64)
    threshold = sort_keys(tl.load(threshold_ptr))
    quota = tl.load(quota_ptr)
    others = tl.arange(0, MAX_PROGRAMS)
    before = (others < program) & COUNTED
    ties = tl.sum(tl.load(counts_ptr + others, mask=before, other=0))
    for i in range(BLOCKS):
        offs = (program * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        key, valid = load_keys(bits_ptr, mask_ptr, offs, n, HAS_MASK)
        equal = (valid & (key == threshold)).to(tl.int32)
        if COUNTED:
            within = (equal != 0) & (ties + tl.cumsum(equal, 0) <= quota)
            selected = (valid & (key > threshold)) | within
            tl.store(selected_ptr + offs, selected.to(tl.uint8), mask=offs < n)
        ties += tl.sum(equal)
    if not COUNTED:
        tl.store(counts_ptr + program, ties)
