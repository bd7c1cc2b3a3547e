"""The extension _cuda: the kernels of csrc/cuda, or why they cannot be launched here."""

from types import ModuleType

import torch

from .. import _extensions, device
from .._compiler import constant


def cuda() -> ModuleType:
    """The kernels. The caller has asked `why_missing`."""
    module, why = _extensions.load("cuda")
    assert module is not None, why
    return module


@constant
def why_missing() -> str | None:
    """A sentence saying why no kernel can be launched, whatever the GPU; None where one can.

    The runtime is a part of the extension. It runs with drivers of its own major version of CUDA
    and newer ones.
    """
    module, why = _extensions.load("cuda")
    if module is None:
        return why
    wanted, found = module.runtime_version(), module.driver_version()
    if found // 1000 >= wanted // 1000:
        return None
    name = f"{module.__name__} is built with CUDA {_dotted(wanted)}, and "
    if found == 0:
        return name + "this machine has no driver for it"
    return (
        f"{name}the driver's is {_dotted(found)}; install a driver of CUDA {wanted // 1000}, or "
        f"the package again with an nvcc of CUDA {found // 1000}"
    )


@constant
def why_not(where: torch.device) -> str | None:
    """A sentence saying why no kernel can be launched on tensors there; None where one can."""
    if where.type != "cuda":
        return f"CUDA kernels need tensors on a GPU; got {where}"
    if torch.version.hip is not None:
        return f"CUDA kernels need a GPU of NVIDIA; got {device.architecture(where)}"
    return why_missing()


def architectures() -> tuple[str, ...]:
    """Those that are compiled for: "80", "90a", "100a" or some of them."""
    return tuple(cuda().architectures.split())


def state() -> str:
    """How the extension was built, and the CUDA of the driver, or why it cannot be used."""
    module, why = _extensions.load("cuda")
    if module is None:
        return str(why)
    names = ", ".join(f"sm_{name}" for name in architectures())
    versions = map(_dotted, (module.runtime_version(), module.driver_version()))
    return f"built by {module.compiler} with CUTLASS {module.cutlass}, for {names}; " + (
        why_missing() or "its CUDA is {}, the driver's is {}".format(*versions)
    )


def _dotted(version: int) -> str:
    """13.0 of 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
