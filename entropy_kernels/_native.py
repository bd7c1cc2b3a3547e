"""The compiled extensions of csrc/: loading them, and what they are given checked.

They take raw pointers and sizes, and know nothing of torch.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """entropy_kernels._{name}, or why it is missing.

    torch comes first (this file imports it): it ships its own OpenMP runtime, and an extension
    loaded after it joins that thread pool instead of starting another.
    """
    full_name = f"entropy_kernels._{name}"
    try:
        return importlib.import_module(full_name), None
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == full_name
        state = "is not built" if absent else "does not load"
        return None, (
            f"{full_name} {state}: {type(error).__name__}: {error}; "
            "reinstall with a C++ compiler on PATH"
        )


def cpu() -> ModuleType | None:
    """The CPU kernels, or None where they are missing."""
    return _load("cpu")[0]


def why_missing(name: str) -> str | None:
    """A sentence saying why extension `name` ("cpu") is missing; None where it is there."""
    return _load(name)[1]


def radix_histogram(
    values: Tensor,
    mask: Tensor | None,
    prefix: int,
    shift: int,
    bits: int,
    prefix_bits: int,
    counts: Tensor,
) -> None:
    """Adds to counts[d] how many valid values carry digit d of their key.

    A value's key is an unsigned 32-bit integer that orders like the number: -0 equals +0, and a
    NaN of either sign ranks above +inf. Its digit is the `bits` bits above `shift`. Only keys
    whose top `prefix_bits` bits equal `prefix` are counted (0: all of them).

    values is contiguous fp32 on the CPU, mask contiguous bool of the same size (true is valid,
    None is all), counts contiguous int64 [2**bits] with bits <= 20. Integers: the same at any
    number of threads. Nothing is differentiable. The caller has checked `cpu()`.
    """
    module = cpu()
    assert module is not None, why_missing("cpu")
    assert _is_plain(values, torch.float32)
    assert mask is None or (_is_plain(mask, torch.bool) and mask.numel() == values.numel())
    assert 1 <= bits <= 20
    assert _is_plain(counts, torch.int64)
    assert counts.numel() == 1 << bits
    assert 0 <= prefix_bits <= 32
    assert 0 <= prefix < 1 << prefix_bits
    assert 0 <= shift <= 32 - bits
    module.radix_histogram(
        values_ptr=values.data_ptr(),
        mask_ptr=0 if mask is None or mask.numel() == 0 else mask.data_ptr(),
        n=values.numel(),
        prefix=prefix,
        shift=shift,
        bits=bits,
        prefix_bits=prefix_bits,
        counts_ptr=counts.data_ptr(),
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether data_ptr() is the first of numel() values of `dtype` in this machine's memory."""
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
