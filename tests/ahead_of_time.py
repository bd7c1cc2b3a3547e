"""Compiles what launchers launch, for a GPU that is not there, and counts what came out.

python -m tests.ahead_of_time TARGET [CASE...]    a JSON line for every launch of every case

Launchers run on meta tensors, and their launches end when they are compiled. So constants, warps,
stages, descriptors and the divisibility of every argument are those of a real run. It needs a
process without TRITON_INTERPRET, which is read as kernels are defined.

T tokens, D hidden, V vocabulary.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from entropy_kernels import device

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Instructions to count: in SASS by the first word, in PTX and AMD's assembly by any.
SASS = ("LDL", "STL", "HGMMA", "HMMA", "LDGSTS", "UTMALDG", "USETMAXREG")
PTX = ("wgmma.mma_async", "mma.sync", "cp.async.bulk.tensor", "tcgen05.mma", "setmaxnreg")
AMDGCN = ("v_mfma", "scratch_load", "scratch_store", "buffer_store_dword off, s")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}


class Launch(NamedTuple):
    """One compiled kernel."""

    case: str
    kernel: str
    dots: bool
    """Whether it multiplies matrices of 16-bit numbers."""
    descriptors: int
    divisible: list[bool]
    """Whether the compiler may take each pointer's address as a multiple of 16 bytes."""
    figures: dict[str, int]
    error: str = ""
    """Why it did not compile; then the rest is empty."""


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


def inspect(case: str, kernel: Any) -> Launch:
    """What the tests look at."""
    ttir, metadata = kernel.asm["ttir"], kernel.metadata
    figures = {"shared": metadata.shared, "warps": metadata.num_warps}
    if "cubin" in kernel.asm:
        figures |= _count(SASS, _sass(kernel.asm["cubin"]), first_word=True)
        figures |= _count(PTX, kernel.asm["ptx"])
        figures["registers"] = _most(r"REG:(\d+)", _resources(kernel.asm["cubin"]))
        figures["stack"] = _most(r"STACK:(\d+)", _resources(kernel.asm["cubin"]))
    else:
        text = kernel.asm["amdgcn"]
        figures |= _count(AMDGCN, text)
        figures["registers"] = _most(r"\.vgpr_count:\s+(\d+)", text)
        # Spilled scalar registers go to lanes of vector registers, not to memory.
        figures["spills"] = _most(r"\.vgpr_spill_count:\s+(\d+)", text)
        figures["scratch"] = _most(r"\.private_segment_fixed_size:\s+(\d+)", text)
    head = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttir, re.DOTALL)
    assert head is not None, f"{metadata.name}: no head in its TTIR"
    pointers = re.findall(r"!tt\.ptr<\w+>(?: \{([^}]*)\})?", head[1])
    return Launch(
        case,
        metadata.name,
        dots=bool(re.search(r"tt\.dot .*(?:bf16|f16)>", ttir)),
        descriptors=len(re.findall(r"!tt\.tensordesc<", head[1])),
        divisible=["tt.divisibility = 16" in attributes for attributes in pointers],
        figures=figures,
    )


def _count(names: tuple[str, ...], text: str, first_word: bool = False) -> dict[str, int]:
    if first_word:
        word = r"^\s+(?:/\*\w+\*/)?\s+(?:@!?U?P\w+ )?(\w+)"
        words = Counter(re.findall(word, text, re.MULTILINE))
        return {name: words[name] for name in names}
    return {name: text.count(name) for name in names}


def _most(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def _sass(cubin: bytes) -> str:
    return _tool([str(BIN / "nvdisasm"), "-c"], cubin)


def _resources(cubin: bytes) -> str:
    return _tool([str(BIN / "cuobjdump"), "-res-usage"], cubin)


def _tool(command: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    return done.stdout


def compiled_cases(name: str, cases: dict[str, Callable[[], object]]) -> Iterator[Launch]:
    """Every distinct kernel that the cases launch on the target `name`."""
    seen = set()
    for case, launch in cases.items():
        with compiled(name) as found:
            try:
                launch()
            except Exception as error:
                # The compiler's failure is a finding: the others are still wanted.
                text = f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"
                yield Launch(case, "?", False, 0, [], {}, text)
        for kernel in found:
            if kernel.metadata.hash not in seen:
                seen.add(kernel.metadata.hash)
                yield inspect(case, kernel)


def main(name: str, wanted: list[str]) -> None:
    from tests.compile_cases import cases

    chosen = {k: f for k, f in cases(name).items() if not wanted or any(w in k for w in wanted)}
    for launch in compiled_cases(name, chosen):
        print(json.dumps(launch._asdict()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m tests.ahead_of_time", description=__doc__)
    parser.add_argument("target", help=f"such as {', '.join(TARGETS)}")
    parser.add_argument("case", nargs="*", help="part of a case's name; all cases without one")
    options = parser.parse_args()
    main(options.target, options.case)
