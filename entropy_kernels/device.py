"""What GPU this is, and what Triton and torch can do on it: asked here and nowhere else.

An architecture is a string: "sm_90", "gfx942", or "interpreter" where kernels run on the CPU.
Triton is imported when it is first asked for: this module loads without it.
"""

import contextlib
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

INTERPRETER = "interpreter"

# Shared memory of one block, in KB.
_SHARED_KB = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx942": 64}
_LEAST_SHARED_KB = 99
_PROCESSORS_OF_THE_INTERPRETER = 3


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET, read as their files load."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """The architecture of `device`, as the table of tiles names it."""
    return INTERPRETER if interpreting() else _architecture_of(device)


@functools.cache
def _architecture_of(device: torch.device) -> str:
    if device.type != "cuda":
        raise ValueError(
            f"Triton kernels need tensors on a GPU, or TRITON_INTERPRET=1; got tensors on {device}"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def processors(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    return _PROCESSORS_OF_THE_INTERPRETER if interpreting() else _processors_of(device)


def programs(units: int, device: torch.device) -> int:
    """Programs that share `units` of work in a persistent kernel: one per multiprocessor, at most.

    EK_PERSISTENT=off gives each unit a program, for GPUs whose multiprocessors are shared with
    NCCL. There a program of many units may only start when others end: up to twice the time, by
    prediction. Alone, programs of one unit cost 3% more, by prediction: none sums the last columns
    of a unit while it multiplies the next.
    """
    return min(units, processors(device)) if persistent() else units


def persistent() -> bool:
    """Whether EK_PERSISTENT is "on", as where it is unset or empty.

    Raises:
        ValueError: another value than on or off.
    """
    found = (os.environ.get("EK_PERSISTENT") or "on").strip().lower()
    if found not in ("on", "off"):
        raise ValueError(f"EK_PERSISTENT must be on or off; got {found!r}")
    return found == "on"


@functools.cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch returns fp32 products of matrices of `dtype` there: it is asked for two, once.

    A CPU refuses; so does ROCm up to torch 2.9, and later where it takes its CK backend.
    """
    matrix = torch.zeros(16, 16, dtype=dtype, device=device)
    batch = matrix.unsqueeze(0)
    return _succeeds(torch.mm, matrix, matrix) and _succeeds(torch.bmm, batch, batch)


@functools.cache
def adds_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU adds such a product to an fp32 matrix in place: 16 bits from torch 2.12 on."""
    if device.type != "cuda" or dtype == torch.float32:
        return device.type == "cuda"
    matrix = torch.zeros(16, 16, dtype=dtype, device=device)
    return _succeeds(torch.addmm, matrix.float(), matrix, matrix)


def _succeeds(product: Callable[..., Tensor], *matrices: Tensor) -> bool:
    out = matrices[0].float()
    try:
        product(*matrices, out_dtype=out.dtype, out=out)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that one block may have."""
    return 1024 * _SHARED_KB.get(arch, _LEAST_SHARED_KB)


def _capability(arch: str) -> int:
    """90 for "sm_90"; 0 for other makers' GPUs."""
    return int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0


def has_tma(arch: str) -> bool:
    """Whether tensor descriptors become bulk copies; below sm_90 they compile, but slowly.

    The interpreter runs them too.
    """
    return arch == INTERPRETER or _capability(arch) >= 90


@functools.cache
def triton_version() -> tuple[int, int]:
    """(3, 6) for Triton 3.6.1."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def has_warp_specialization(arch: str) -> bool:
    """Whether loops may set warp_specialize: Triton 3.6 on Hopper; 3.9 fails to compile them."""
    return _capability(arch) == 90 and triton_version() == (3, 6)
