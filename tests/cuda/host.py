"""Builds the text of csrc/cuda with a host compiler: programs and libraries that run its kernels as
fibers (simt.h), under sanitizers, and broken on purpose."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent
SANITIZERS = {
    "": ("-O1",),
    "thread": ("-O1", "-fsanitize=thread"),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}


class Mutant(NamedTuple):
    """One place of one file of csrc/cuda, broken: `old` stands there once, and becomes `new`."""

    name: str
    file: str
    old: str
    new: str


@functools.cache
def toolkit() -> Path:
    """The include folder of the CUDA toolkit, whose headers CuTe's need; skips without nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("CuTe's headers need those of the CUDA toolkit, and PATH has no nvcc")
    # It may be a script that calls another.
    says = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", says, re.M)
    assert top is not None, says
    return Path(top[1]).resolve() / "include"


@functools.cache
def cutlass() -> Path:
    """The include folder of CUTLASS: EK_CUTLASS_DIR, or that of the installed wheel."""
    named = os.environ.get("EK_CUTLASS_DIR")
    if named is None:
        pytest.skip("EK_CUTLASS_DIR does not say where CUTLASS's headers are")
    return Path(named)


def build(
    folder: Path,
    sources: Iterable[Path],
    *,
    library: bool = False,
    cute: bool = False,
    sanitizer: str = "",
    mutant: Mutant | None = None,
    options: Iterable[str] = (),
) -> Path:
    """Compiles `sources` in `folder`, against csrc/cuda or a copy of it with one mutant.

    sources: files of tests/cuda; those of csrc/cuda they include, `.cu` as well.
    library: a shared library for ctypes in place of a program.
    cute: with the headers of CUTLASS and of the toolkit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = SOURCES
    if mutant is not None:
        text = folder / "cuda"
        shutil.copytree(SOURCES, text, dirs_exist_ok=True)
        broken = text / mutant.file
        before = broken.read_text()
        assert before.count(mutant.old) == 1, f"{mutant.name}: {before.count(mutant.old)} places"
        broken.write_text(before.replace(mutant.old, mutant.new))
    product = folder / ("host.so" if library else "host")
    command = [
        "g++",
        "-std=c++17",
        "-g1",
        "-Wall",
        *SANITIZERS[sanitizer],
        f"-I{text}",
        f"-I{HERE}",
    ]
    if cute:
        headers = (cutlass(), toolkit(), toolkit() / "cccl")
        command += [word for path in headers for word in ("-isystem", str(path))]
        command += ["-Wno-deprecated-declarations", "-Wno-unknown-pragmas"]
    command += ["-fPIC", "-shared"] if library else []
    command += [*options, "-x", "c++", *map(str, sources), "-o", str(product)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return product


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of `build`; addresses are not random, as ThreadSanitizer wants it."""
    return subprocess.run(
        ["setarch", "-R", str(program), *arguments], capture_output=True, text=True, timeout=600
    )
