"""Ahead-of-time compilation of what a launcher would launch: no GPU, and no signature by hand.

`compiled(arch)` stands in for the GPU's driver, so the launchers can be called on meta tensors;
each kernel they launch is compiled and kept. For a process in which TRITON_INTERPRET is not set.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from entropy_kernels import device

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}


class Resources(NamedTuple):
    """What one compiled kernel takes; `sass` counts instructions by name, up to the first dot."""

    registers: int
    spills: int
    shared: int
    threads: int
    sass: Counter[str]


class _Driver:
    """As much of a driver as compilation asks for; each architecture is a device of its own."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.arch.startswith("sm_"):
            return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.arch, 64)


@contextmanager
def compiled(arch: str) -> Iterator[list]:
    """The kernels (triton's CompiledKernel) of all launches inside, compiled for `arch`."""
    assert not device.interpreting()
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    with (
        patch.object(driver, "_active", _Driver(arch)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(device, "architecture", lambda device: arch),
        patch.object(device, "processors", lambda device: PROCESSORS.get(arch, 100)),
    ):
        yield kernels


def resources(kernel) -> Resources:
    """Registers and spilled bytes of a kernel for NVIDIA, read from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = Counter(
            match.split(".")[0]
            for match in re.findall(
                r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9.]*)",
                _run("nvdisasm", "-hex", "-c", file.name),
            )
        )
    (registers,) = re.findall(r"REG:(\d+)", usage)
    (local,) = re.findall(r"STACK:(\d+)", usage)
    spills = int(local) + sass["LDL"] + sass["STL"]
    return Resources(
        int(registers), spills, kernel.metadata.shared, 32 * kernel.metadata.num_warps, sass
    )


def _run(tool: str, *args: str) -> str:
    return subprocess.run([BIN / tool, *args], check=True, capture_output=True, text=True).stdout
