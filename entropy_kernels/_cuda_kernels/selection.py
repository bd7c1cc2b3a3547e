"""The threshold of a selection and the exact selection, by csrc/cuda/selection.cu.

Everything is an integer, so the results are the same in whatever order the blocks run. The host
waits for nothing.
"""

from typing import Any

import torch
from torch import Tensor

from .. import device
from .._compiler import constant
from .arguments import Given, check, pointer, stream
from .module import cuda


@constant
def most_of_one_block() -> int:
    """How many values `top` takes."""
    return int(cuda().one_block)


def top(
    values: Tensor, mask: Tensor | None, share: float, select: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.top`, in one launch of one block."""
    assert values.numel() <= most_of_one_block()
    module, given = cuda(), _values("top", values, mask)
    quota, equal = (torch.empty((), dtype=torch.int64, device=values.device) for _ in range(2))
    threshold = torch.empty((), dtype=torch.float32, device=values.device)
    selected = torch.empty_like(values if select else values[:0], dtype=torch.bool)
    found = module.Top(
        threshold=pointer(threshold),
        quota=pointer(quota),
        equal=pointer(equal),
        selected=pointer(selected),
        rows=0,
        number=0,
    )
    with device.on(values.device):
        module.top(values=given, share=share, top=found, stream=stream(values.device))
    return threshold, quota, equal, selected


def radix_histogram(
    values: Tensor, mask: Tensor | None, prefix: Tensor, shift: int, bits: int, prefix_bits: int
) -> Tensor:
    """The counts of a digit, int64 [1 << bits], as `ops.radix_histogram` has them."""
    given = _values("radix_histogram", values, mask)
    check("radix_histogram", values, {"prefix": (prefix, torch.int64, ())})
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    if values.numel() == 0:
        return counts
    with device.on(values.device):
        cuda().radix_histogram(
            values=given,
            prefix=pointer(prefix),
            shift=shift,
            bits=bits,
            prefix_bits=prefix_bits,
            counts=pointer(counts),
            stream=stream(values.device),
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
    """The digit of the k-th largest, as `ops.radix_pick` has it."""
    bits = counts.numel().bit_length() - 1
    tensors: dict[str, Given] = {
        "counts": (counts, torch.int64, (1 << bits,)),
        "local": (local, torch.int64, (1 << bits,)),
        "prefix": (prefix, torch.int64, ()),
        "remaining": (remaining, torch.int64, ()),
    }
    given = check("radix_pick", counts, tensors)
    new_prefix, new_remaining, equal = (torch.empty_like(prefix) for _ in range(3))
    value = torch.empty((), dtype=torch.float32, device=counts.device)
    with device.on(counts.device):
        cuda().radix_pick(
            **given,
            share=share,
            shift=shift,
            bits=bits,
            new_prefix=pointer(new_prefix),
            new_remaining=pointer(new_remaining),
            equal=pointer(equal),
            value=pointer(value),
            stream=stream(counts.device),
        )
    return new_prefix, new_remaining, equal, value


def select_largest(values: Tensor, mask: Tensor | None, threshold: Tensor, quota: Tensor) -> Tensor:
    """The values above the threshold and the first `quota` equal to it: bool [N].

    As `ops.select_largest`. It allocates 8 KB beside its result.
    """
    module, given = cuda(), _values("select_largest", values, mask)
    bounds: dict[str, Given] = {
        "threshold": (threshold, torch.float32, ()),
        "quota": (quota, torch.int64, ()),
    }
    bound = check("select_largest", values, bounds)
    selected = torch.empty_like(values, dtype=torch.bool)
    if values.numel() == 0:
        return selected
    counts = torch.empty(module.select_blocks, dtype=torch.int64, device=values.device)
    with device.on(values.device):
        module.select_largest(
            values=given,
            **bound,
            counts=pointer(counts),
            selected=pointer(selected),
            stream=stream(values.device),
        )
    return selected


def _values(call: str, values: Tensor, mask: Tensor | None) -> Any:
    shape = (values.numel(),)
    tensors: dict[str, Given] = {
        "value": (values, torch.float32, shape),
        "mask": (mask, torch.bool, shape),
    }
    return cuda().Values(**check(call, values, tensors), count=values.numel())
