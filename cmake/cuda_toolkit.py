"""What a build of csrc/cuda needs, and finds on this machine. The build backend and setup.py ask.

The environment says more:
    EK_CUDA: 0 builds no CUDA kernels, 1 fails where they cannot be built; unset, they are built
        where nvcc is found.
    CUDACXX: the nvcc to take, in place of PATH's.
    EK_CUTLASS_DIR: the folder of CUTLASS's headers, in place of the wheel's that CUTLASS names.
    EK_CUDA_ARCHITECTURES: some of ARCHITECTURES, divided by commas; unset, those of this machine's
        GPUs, or all where none is seen.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

CUTLASS = "nvidia-cutlass==4.2.0.0"
LEAST_NVCC = (12, 8)  # the first that compiles for 100a
ARCHITECTURES = ("80", "90a", "100a")


def check_choices() -> None:
    """Raises ValueError for what the environment says and cannot be."""
    if wanted() is not False:
        cutlass()
        named_architectures()


def wanted() -> bool | None:
    """What EK_CUDA says; None where that is left to the machine.

    Raises:
        ValueError: another value than 0 and 1.
    """
    given = os.environ.get("EK_CUDA", "")
    if given not in ("", "0", "1"):
        raise ValueError(f"EK_CUDA must be 0, 1 or unset; got {given!r}")
    return bool(int(given)) if given else None


def nvcc() -> str | None:
    """The compiler for CUDA, if there is one."""
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def nvcc_version(compiler: str) -> tuple[int, int]:
    """(13, 0) of nvcc 13.0."""
    printed = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", printed)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def why_no_nvcc() -> str | None:
    """What the compiler for csrc/cuda lacks; None if nothing."""
    compiler = nvcc()
    if compiler is None:
        named = os.environ.get("CUDACXX")
        return f"no nvcc ({f'CUDACXX={named} is not found' if named else 'PATH has none'})"
    version = nvcc_version(compiler)
    if version < LEAST_NVCC:
        least, got = (".".join(map(str, x)) for x in (LEAST_NVCC, version))
        return f"no nvcc of CUDA {least} or newer ({compiler} is of {got})"
    return None


def requirements() -> list[str]:
    """What a build needs beyond the requirements in pyproject.toml."""
    needless = wanted() is False or os.environ.get("EK_CUTLASS_DIR") or why_no_nvcc() is not None
    return [] if needless else [CUTLASS]


def cutlass() -> Path | None:
    """The folder of CUTLASS's headers, if there is one.

    Raises:
        ValueError: EK_CUTLASS_DIR names another folder.
    """
    if given := os.environ.get("EK_CUTLASS_DIR"):
        if not Path(given, "cutlass", "version.h").is_file():
            raise ValueError(
                "EK_CUTLASS_DIR must be a folder with cutlass/version.h, as CUTLASS's include/ is; "
                f"got {given}"
            )
        return Path(given).resolve()
    found = importlib.util.find_spec("cutlass_library")
    folders = found.submodule_search_locations if found else None
    return Path(folders[0], "source", "include") if folders else None


def named_architectures() -> list[str]:
    """What EK_CUDA_ARCHITECTURES names, in the order of ARCHITECTURES; none if it is unset.

    Raises:
        ValueError: it names another one.
    """
    given = os.environ.get("EK_CUDA_ARCHITECTURES", "")
    named = given.split(",") if given else []
    if not {*named} <= {*ARCHITECTURES}:
        raise ValueError(
            f"EK_CUDA_ARCHITECTURES must be some of {', '.join(ARCHITECTURES)}, divided by commas; "
            f"got {given!r}"
        )
    return [name for name in ARCHITECTURES if name in named]


def architectures() -> list[str]:
    """Those of ARCHITECTURES that are compiled for; none where no GPU of this machine runs any."""
    seen = capabilities()
    fit = {_architecture(*capability) for capability in seen}
    here = [name for name in ARCHITECTURES if not seen or name in fit]
    return named_architectures() or here


def capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs that the driver sees."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    ask = [command, "--query-gpu=compute_cap", "--format=csv,noheader"]
    printed = subprocess.run(ask, capture_output=True, text=True).stdout
    return [(int(x), int(y)) for x, y in re.findall(r"^(\d+)\.(\d+)$", printed, re.M)]


def _architecture(major: int, minor: int) -> str | None:
    """What a GPU of that capability runs; newer ones compile the PTX of 80 when they load it."""
    if major < 8:
        return None
    return {(9, 0): "90a", (10, 0): "100a"}.get((major, minor), "80")


def lacking() -> str | None:
    """What the build of csrc/cuda lacks on this machine; None if nothing."""
    why = why_no_nvcc()
    if why is None and cutlass() is None:
        why = f"no headers of CUTLASS ({CUTLASS} is not installed, and EK_CUTLASS_DIR names none)"
    if why is None and not architectures():
        why = "no GPU of compute capability 8.0 or newer"
    return why
