"""What nvcc made of the CUDA kernels: registers, memory and instructions, read in the module.

python -m tests.cuda.machine_code [FILE...]    prints a table; ends with 1 where something is wrong

Without FILEs, which are modules or objects, it reads entropy_kernels._cuda. No GPU is needed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import table
from entropy_kernels._extensions import load
from tests.ahead_of_time import BIN

# What the kernels of the head must have.
WANTED = {
    "sm_80": ("HMMA", "LDGSTS"),
    "sm_90a": ("HGMMA", "UTMALDG", r"UTMALDG\S*\.MULTICAST", "USETMAXREG"),
    "sm_100a": (r"UTCHMMA\S*\.2CTA", r"UTMALDG\S*\.2CTA", "LDTM"),
}
# What no kernel may have: registers that went to memory.
NEVER = ("LDL", "STL")
# Stages of the main loop, where a kernel's name does not have them.
STAGES = 3
HEAD = {"ForwardTile": "forward", "RowEpilogue": "forward", "DlogitsTile": "dlogits"}


class Kernel(NamedTuple):
    """One entry of one architecture.

    mangled: the name in the object.
    tile: rows, columns and depth of a product, and the stages of its main loop; None for others.
    shared: bytes, besides those of the main loop.
    stack: bytes per thread, as `local`. Only spills and arrays need them.
    code: the listing of nvdisasm.
    """

    name: str
    mangled: str
    architecture: str
    statistics: bool
    tile: tuple[int, int, int, int] | None
    registers: int
    shared: int
    stack: int
    local: int
    code: str

    def __str__(self) -> str:
        tile = "" if self.tile is None else " " + "x".join(map(str, self.tile[:3]))
        return f"{self.name}{', statistics' * self.statistics}{tile} of {self.architecture}"

    def count(self, instruction: str) -> int:
        """How often an instruction, a regular expression, stands in the code."""
        return len(re.findall(rf"^\s+/\*\w+\*/ .*?\b{instruction}\b", self.code, re.MULTILINE))

    @property
    def operands(self) -> int:
        """Bytes of shared memory for the tiles of a main loop; those of a pair are divided."""
        if self.tile is None:
            return 0
        rows, columns, depth, stages = self.tile
        return 2 * stages * (rows + columns) * depth // (2 if self.architecture == "sm_100a" else 1)

    @property
    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = [f"{self}: {x}" for x in NEVER if self.count(x)]
        wanted = WANTED[self.architecture] if self.tile is not None else ()
        found += [f"{self}: no {x}" for x in wanted if not self.count(x)]
        if self.stack or self.local:
            found.append(f"{self}: {self.stack} bytes of stack, {self.local} of local memory")
        return found


def module() -> tuple[Path | None, str | None]:
    """The built module; or None, and why."""
    found, why = load("cuda")
    return (None, why) if found is None else (Path(str(found.__file__)), None)


def sources(words: list[str]) -> list[Path]:
    """The files of a command line; without any the built module."""
    path, why = (None, None) if words else module()
    if why is not None:
        sys.exit(why)
    return [Path(word) for word in words] if path is None else [path]


def kernels(path: Path) -> Iterator[Kernel]:
    """All kernels in a module or an object."""
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", "all", path.resolve(), folder=folder)
        for cubin in sorted(Path(folder).iterdir()):
            usage = _tool("cuobjdump", "-res-usage", cubin)
            figures = re.findall(r"Function (\S+):\s+(.*)", usage)
            codes = dict(_codes(_tool("nvdisasm", "-c", cubin)))
            names = _demangled(name for name, _ in figures)
            for (mangled, text), name in zip(figures, names, strict=True):
                yield _kernel(name, mangled, cubin.suffixes[-2].strip("."), text, codes[mangled])


def _tool(name: str, *words: object, folder: str | None = None) -> str:
    command = [str(BIN / name), *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    return done.stdout


def _codes(listing: str) -> Iterator[tuple[str, str]]:
    """Each function's mangled name and its lines."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", listing, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _demangled(names: Iterable[str]) -> list[str]:
    words = "\n".join(names)
    done = subprocess.run(["c++filt"], input=words, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def _kernel(name: str, mangled: str, architecture: str, usage: str, code: str) -> Kernel:
    found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    epilogue = re.search("|".join(HEAD), name)
    # A plain kernel's own name, without namespaces and arguments.
    plain = re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "")).split("::")[-1]
    return Kernel(
        plain if epilogue is None else HEAD[epilogue[0]],
        mangled,
        architecture,
        epilogue is not None and f"{epilogue[0]}<true>" in name,
        None if epilogue is None else _tile(name),
        found["REG"],
        found["SHARED"],
        found["STACK"],
        found["LOCAL"],
        code,
    )


def _tile(name: str) -> tuple[int, int, int, int]:
    """That of CUTLASS's main loop, or of ours for sm_80."""
    sizes = re.search(r", cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(64)> >", name)
    stages = re.search(r"WarpSpecialized<(\d+),", name)
    if sizes is None or stages is None:
        return 128, 128, 64, STAGES
    return int(sizes[1]), int(sizes[2]), int(sizes[3]), int(stages[1])


def text(found: list[Kernel]) -> str:
    """A table in Markdown, a row per kernel."""
    columns = ["kernel", "registers", "shared memory, KiB", "stages", "instructions"]
    rows = []
    for kernel in sorted(found, key=lambda x: (x.tile is None, len(x.architecture), str(x))):
        wanted = WANTED[kernel.architecture] if kernel.tile else ()
        names = (re.sub(r"\\S\*|\\", "", x) for x in wanted)
        counts = (f"{name} {kernel.count(x)}" for name, x in zip(names, wanted, strict=True))
        shared = f"{(kernel.shared + kernel.operands) / 1024:.0f}"
        stages = str(kernel.tile[3]) if kernel.tile else ""
        rows.append([str(kernel), str(kernel.registers), shared, stages, ", ".join(counts)])
    return table(columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.cuda.machine_code", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE")
    found = [kernel for path in sources(parser.parse_args().files) for kernel in kernels(path)]
    faults = [fault for kernel in found for fault in kernel.faults]
    print("\n".join([text(found), *faults]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
