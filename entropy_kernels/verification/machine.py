"""What an answer about a kernel holds for: one kind of GPU, with its driver and compilers."""

import contextlib
import functools
import hashlib
import json
import re
import subprocess
from pathlib import Path

import torch

from .. import device
from .._cuda_kernels import module as cuda_module

_PACKAGE = Path(__file__).parents[1]
# What decides an answer: the kernels, and the cases that judge them.
_SOURCES = ("_triton/**/*.py", "_cuda_kernels/*.py", "verification/*.py", "_bounds.py")
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def machine(where: torch.device) -> dict[str, str]:
    """All that an answer depends on; another value of any is another machine."""
    import triton

    missing = cuda_module.why_missing() is not None
    of_cuda = {} if missing else {"csrc/cuda": cuda_module.cuda().sources}
    return {
        "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "architecture": device.architecture(where),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,  # its distribution has other names on ROCm
        "cuda": str(torch.version.cuda or torch.version.hip),
        "kernels": sources(),
        **of_cuda,
    }


def folder_name(about: dict[str, str]) -> str:
    """The name of the machine's folder of answers: the GPU's, and a digest of all."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^a-z0-9]+', '-', about['gpu'].lower()).strip('-')}-{digest[:16]}"


@functools.cache
def sources() -> str:
    """A digest of the kernels' and the cases' files."""
    found = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_PACKAGE.glob(pattern)):
            found.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def _driver() -> str:
    for path in map(Path, _DRIVERS):
        with contextlib.suppress(OSError, IndexError):
            return path.read_text().splitlines()[0].strip()
    # WSL has no such file.
    asked = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with contextlib.suppress(OSError, IndexError, subprocess.SubprocessError):
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()[0].strip()
    return "unknown"
