"""The values above a threshold and the first of those equal to it, on a GPU.

Programs have consecutive blocks: one launch counts the ties of each, and a second gives each what
the programs before it leave of the quota. The host waits for neither.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device
from .launch import MAX_PROGRAMS, load_keys, partition, sort_keys

BLOCK = 1024


@triton.jit
def _count_kernel(
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
def _write_kernel(
    bits_ptr,
    mask_ptr,
    threshold_ptr,
    quota_ptr,
    counts_ptr,
    keep_ptr,
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
        keep = (valid & (key > threshold)) | within
        tl.store(keep_ptr + offs, keep.to(tl.uint8), mask=offs < n)
        quota -= tl.sum(equal)


def keep_largest(values: Tensor, mask: Tensor | None, threshold: Tensor, quota: Tensor) -> Tensor:
    """`_radix.keep_largest`: bool [N]. Reads every value twice; 8 KB beside what it returns."""
    keep = torch.empty_like(values, dtype=torch.bool)
    programs, blocks = partition(values.numel(), BLOCK)
    if programs == 0:
        return keep
    counts = torch.empty(MAX_PROGRAMS, dtype=torch.int64, device=values.device)
    bits = values.view(torch.int32)
    valid = None if mask is None else mask.view(torch.uint8)
    threshold = threshold.view(torch.int32)
    with device.on(values.device):
        _count_kernel[(programs,)](
            bits,
            valid,
            threshold,
            counts,
            values.numel(),
            HAS_MASK=mask is not None,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
        _write_kernel[(programs,)](
            bits,
            valid,
            threshold,
            quota,
            counts,
            keep.view(torch.uint8),
            values.numel(),
            HAS_MASK=mask is not None,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return keep
