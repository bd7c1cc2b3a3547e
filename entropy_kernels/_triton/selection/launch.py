"""The threshold of a selection, digit by digit, and the exact selection, on a GPU.

Everything is an integer, so the results are the same in whatever order the programs run. A digit
takes one launch over the values and one program over the counts. The selection takes two launches:
one counts the ties of each program, and one gives each what the programs before it leave of the
quota. The host waits for nothing.
"""

import struct

import torch
from torch import Tensor

from ... import device
from ..common import partition
from .key_functions import DENSE_BITS
from .largest_kernel import largest_kernel
from .radix_kernels import histogram_kernel, pick_kernel

HISTOGRAM_BLOCK = 2048
LARGEST_BLOCK = 1024


def radix_histogram(
    values: Tensor, mask: Tensor | None, prefix: Tensor, shift: int, bits: int, prefix_bits: int
) -> Tensor:
    """The counts of a digit, int64 [1 << bits], as `_radix.radix_histogram` has them.

    It reads every value once and writes no temporary.
    """
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    programs, blocks = partition.programs(values.numel(), HISTOGRAM_BLOCK)
    if programs == 0:
        return counts
    with device.on(values.device):
        histogram_kernel[(programs,)](
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
            BLOCK=HISTOGRAM_BLOCK,
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
    """The digit of the k-th largest, as `_radix.radix_pick` has it, of at most 2048 bins."""
    bits = counts.numel().bit_length() - 1
    assert counts.numel() == 1 << bits
    assert bits <= DENSE_BITS.value
    new_prefix, new_remaining, equal = (torch.empty_like(prefix) for _ in range(3))
    value = torch.empty((), dtype=torch.float32, device=counts.device)
    with device.on(counts.device):
        pick_kernel[(1,)](
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


def select_largest(values: Tensor, mask: Tensor | None, threshold: Tensor, quota: Tensor) -> Tensor:
    """The values above the threshold and the first `quota` equal to it: bool [N].

    As `_radix.select_largest`. It reads every value twice and allocates 8 KB beside its result.
    """
    selected = torch.empty_like(values, dtype=torch.bool)
    programs, blocks = partition.programs(values.numel(), LARGEST_BLOCK)
    if programs == 0:
        return selected
    counts = torch.empty(partition.MAX_PROGRAMS, dtype=torch.int64, device=values.device)
    bits = values.view(torch.int32)
    valid = None if mask is None else mask.view(torch.uint8)
    threshold = threshold.view(torch.int32)
    with device.on(values.device):
        for counted in (False, True):
            largest_kernel[(programs,)](
                bits,
                valid,
                threshold,
                quota,
                counts,
                selected.view(torch.uint8),
                values.numel(),
                HAS_MASK=mask is not None,
                COUNTED=counted,
                BLOCKS=blocks,
                BLOCK=LARGEST_BLOCK,
                MAX_PROGRAMS=partition.MAX_PROGRAMS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return selected
