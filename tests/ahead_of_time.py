"""Compiles what launchers launch, for a GPU that is not there, and counts what came out.

python -m tests.ahead_of_time TARGET [WORD...]    a JSON line for every kernel of every case

Launchers run on meta tensors, and their launches end when they are compiled. So constants, warps,
stages, descriptors and the divisibility of every argument are those of a real run. It needs a
process without TRITON_INTERPRET, which is read as kernels are defined.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from entropy_kernels import device

if TYPE_CHECKING:
    from tests.compile_cases import Case

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What to count in the assembly, with what follows it in PTX.
PTX = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma": "mma.sync",
    "bulk_copies": "cp.async.bulk.tensor",
    "async_copies": "cp.async.cg",
    "setmaxnreg": "setmaxnreg",
}
AMDGCN = {"mfma": "v_mfma", "lds_copies": " lds"}
# The most kernels first: they take longest.
TARGETS = ("sm_90", "sm_100", "sm_80", "sm_86", "sm_89", "sm_120", "gfx942")
PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}


class Launch(NamedTuple):
    """One compiled kernel, and the first case that launches it."""

    op: str
    dtype: str
    tile: dict[str, Any] | None
    """The fields of its Tile; None for ops without tiles."""
    flags: tuple[str, ...]
    kernel: str
    dots: bool = False
    """Whether it multiplies matrices of 16-bit numbers."""
    descriptors: int = 0
    unaligned: int = 0
    """Pointers whose address the compiler may not take as a multiple of 16 bytes."""
    figures: Mapping[str, int] = MappingProxyType({})
    """Registers of a thread, bytes of shared memory, warps, and blocks that fit one multiprocessor.
    Bytes of a thread's stack, which only spills need. Counts of instructions."""
    error: str = ""
    """Why it did not compile."""

    def __str__(self) -> str:
        tile = "" if self.tile is None else "-".join(map(str, [*self.tile.values()][:6]))
        name = " ".join((self.kernel, "of", self.op, tile, self.dtype, "+".join(self.flags)))
        return f"{name}: {self.error or self.figures}"


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
    """The kernels (triton's CompiledKernel) of all launches inside, compiled for `arch`.

    It stands in for the GPU's driver, so that launchers can be called on meta tensors.
    """
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


def inspect(case: "Case", kernel: Any) -> Launch:
    """What the tests look at."""
    head = re.search(r"tt\.func public @\w+\((.*?)\) attributes", kernel.asm["ttir"], re.DOTALL)
    assert head is not None, f"{kernel.metadata.name}: no head in its TTIR"
    pointers = re.findall(r"!tt\.ptr<\w+>(?: \{([^}]*)\})?", head[1])
    return Launch(
        *_description(case),
        kernel=kernel.metadata.name,
        dots=bool(re.search(r"tt\.dot .*(?:bf16|f16)>", kernel.asm["ttir"])),
        descriptors=len(re.findall(r"!tt\.tensordesc<", head[1])),
        unaligned=sum("tt.divisibility = 16" not in attributes for attributes in pointers),
        figures=figures(kernel),
    )


def figures(kernel: Any) -> dict[str, int]:
    """As in a Launch, of Triton's CompiledKernel."""
    metadata = kernel.metadata
    found = {"shared": metadata.shared, "warps": metadata.num_warps}
    if "cubin" in kernel.asm:
        usage = _tool("cuobjdump", "-res-usage", kernel.asm["cubin"])
        found["registers"] = _most(r"REG:(\d+)", usage)
        found["stack"] = _most(r"STACK:(\d+)", usage)
        found |= _count(PTX, kernel.asm["ptx"])
    else:
        text = kernel.asm["amdgcn"]
        found["registers"] = _most(r"\.vgpr_count:\s+(\d+)", text)
        # Spilled scalar registers go to lanes of vector registers, not to memory.
        found["spills"] = _most(r"\.vgpr_spill_count:\s+(\d+)", text)
        found["stack"] = _most(r"\.private_segment_fixed_size:\s+(\d+)", text)
        found |= _count(AMDGCN, text)
    found["blocks"] = _blocks(metadata.target, found)
    return found


def _description(case: "Case") -> tuple[Any, ...]:
    tile = None if case.tile is None else case.tile._asdict()
    return case.op, case.dtype, tile, case.flags


def _blocks(target: GPUTarget, figures: dict[str, int]) -> int:
    """How many blocks fit one multiprocessor, by registers, shared memory and threads.

    NVIDIA's has 65,536 registers, given to warps in units of 256, and 1 KB of shared memory more
    than one block may have; a block costs 1 KB. AMD's has four units, with 512 registers a lane.
    """
    warps, registers, shared = (figures[name] for name in ("warps", "registers", "shared"))
    if target.backend == "hip":
        waves = 4 * min(8, 512 // max(1, (registers + 7) // 8 * 8))
        return min(waves // warps, device.shared_memory(target.arch) // max(1, shared))
    arch = f"sm_{target.arch}"
    by_registers = 65536 // ((32 * registers + 255) // 256 * 256 * warps)
    by_memory = (device.shared_memory(arch) + 1024) // (shared + 1024)
    threads = 1536 if arch in ("sm_86", "sm_89", "sm_120") else 2048
    return min(by_registers, by_memory, threads // (32 * warps))


def _count(names: dict[str, str], text: str) -> dict[str, int]:
    return {name: text.count(instruction) for name, instruction in names.items()}


def _most(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def sass(cubin: bytes) -> str:
    """The instructions of a GPU of NVIDIA; 0.2 s of a processor."""
    return _tool("nvdisasm", "-c", cubin)


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / name), option, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def launches(arch: str, words: Iterable[str] = ()) -> Iterator[Launch]:
    """Every distinct kernel of the cases whose op, dtype, variant or flags have all the words."""
    from tests.compile_cases import cases

    seen = set()
    with compiled(arch) as found:
        for case in cases():
            name = {case.op, case.dtype, *case.flags, *((case.tile or ("",))[:1])}
            if not name.issuperset(words):
                continue
            found.clear()
            try:
                case.launch()
            except Exception as error:
                # The compiler's failure is a finding: the others are still wanted.
                text = f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"
                yield Launch(*_description(case), kernel="?", error=text)
            for kernel in found:
                if kernel.metadata.hash not in seen:
                    seen.add(kernel.metadata.hash)
                    yield inspect(case, kernel)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m tests.ahead_of_time", description=__doc__)
    parser.add_argument("target", help=f"such as {', '.join(TARGETS)}")
    parser.add_argument("word", nargs="*", help="an op, a dtype, a variant or a flag")
    options = parser.parse_args()
    for launch in launches(options.target, options.word):
        print(json.dumps(launch._asdict() | {"figures": dict(launch.figures)}), flush=True)
