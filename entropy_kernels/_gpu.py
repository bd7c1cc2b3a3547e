"""Where the Triton kernels of `_triton/` run, and where "auto" takes them.

Triton is imported when it is first asked for: a machine without it has the other paths.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch.torch_version import TorchVersion

from . import device as gpu
from ._compiler import constant

# The first version that compiles every kernel.
LEAST_TRITON = "3.6"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """_triton.{name}, or why it does not load."""
    try:
        found = importlib.import_module("triton").__version__
        if TorchVersion(found) < LEAST_TRITON:
            return None, (
                f"Triton must be {LEAST_TRITON} or newer; got {found}. It is torch's own: "
                "torch 2.10 and newer bring one that fits"
            )
        return importlib.import_module(f"._triton.{name}", __package__), None
    except ImportError as error:
        return None, f"Triton does not load: {type(error).__name__}: {error}"


def kernels(name: str) -> ModuleType:
    """The launchers of op `name`. The caller has asked whether they run."""
    module, why = _load(name)
    assert module is not None, why
    return module


@constant
def why_not(device: torch.device) -> str | None:
    """A sentence saying why the kernels cannot run on tensors of `device`; None where they can."""
    tiles, why = _load("common.tiles")
    if tiles is None:
        return why
    if device.type == "cuda" or (device.type == "cpu" and gpu.interpreting()):
        return None
    return f"Triton kernels need tensors on a GPU, or TRITON_INTERPRET=1; got {device}"


@constant
def verified(device: torch.device) -> bool:
    """Whether "auto" takes the kernels: `device` is a GPU on which they were found to be right."""
    if device.type != "cuda" or why_not(device) is not None:
        return False
    return gpu.verified(device)


def architecture(device: torch.device) -> str:
    """What the kernels' table of tiles calls the GPU `device`. The caller has asked `why_not`."""
    return gpu.architecture(device)


@constant
def keeps_rows(device: torch.device, dtype: torch.dtype, hidden: int) -> bool:
    """Whether forward keeps rows above a threshold there. The caller has asked `why_not`."""
    return kernels("common.tiles").stores_rows(device, dtype, hidden)


def products() -> int:
    """Multiplications in the kernels' products so far: half their flops."""
    module, _ = _load("common.products")
    return 0 if module is None else module.counted()
