"""Builds the text of csrc/cuda with a host compiler: programs and libraries that run its kernels as
fibers (simt.h), under sanitizers, and broken on purpose."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent
CPU_SECONDS = 100  # of a program, after which it hangs
# Headers compiled once for all workers and runs.
SHARED = ROOT / "build" / "cuda-tests"
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


def skip(why: str) -> None:
    """Skips the test, or fails it where nvcc has been found, so that nothing may be missing."""
    (pytest.fail if os.environ.get("EK_REQUIRE_CUDA") == "1" else pytest.skip)(why)


@functools.cache
def toolkit() -> Path:
    """The include folder of the CUDA toolkit, whose headers CuTe's need; skips without nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        skip("CuTe's headers need those of the CUDA toolkit, and PATH has no nvcc")
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
        skip("EK_CUTLASS_DIR does not say where CUTLASS's headers are")
    return Path(named)


class DoesNotCompile(Exception):
    """The compiler refused: no answer to whether a mutant is noticed."""


class Crash(Exception):
    """The program ended by itself: no answer either."""


def compiled(command: Iterable[str]) -> None:
    done = subprocess.run([*command], capture_output=True, text=True)
    if done.returncode != 0:
        raise DoesNotCompile(done.stderr)


@functools.cache
def cute_header(options: tuple[str, ...]) -> Path:
    """cute.h beside its compiled form for these options, which g++ takes in its place."""
    text = (HERE / "cute.h").read_text()
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    key = hashlib.sha256("\n".join([text, version.stdout, *options]).encode()).hexdigest()[:16]
    folder = SHARED / key
    folder.mkdir(parents=True, exist_ok=True)
    header, product = folder / "cute.h", folder / "cute.h.gch"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not product.exists():
            header.write_text(text)
            unfinished = folder / "unfinished"
            compiled(["g++", *options, "-x", "c++-header", str(header), "-o", str(unfinished)])
            unfinished.rename(product)
    return header


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
    cute: with the headers of CUTLASS and of the toolkit; cute.h comes first.
    raises: DoesNotCompile.
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
    flags = ["-std=c++17", "-g1", "-Wall", "-Wno-unknown-pragmas"]  # nvcc's unroll is unknown
    flags += [*SANITIZERS[sanitizer], *(["-fPIC"] if library else []), *options]
    include = [f"-I{text}", f"-I{HERE}"]
    if cute:
        headers = (cutlass(), toolkit(), toolkit() / "cccl")
        flags += [word for path in headers for word in ("-isystem", str(path))]
        flags += ["-Wno-deprecated-declarations"]
        include += ["-include", str(cute_header(tuple(flags)))]
    shared = ["-shared"] if library else []
    files = ["-x", "c++", *map(str, sources), "-o", str(product)]
    compiled(["g++", *flags, *include, *shared, *files])
    return product


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of `build`; addresses are not random, as ThreadSanitizer wants it."""
    within = ["setarch", "-R", "prlimit", f"--cpu={CPU_SECONDS}:{CPU_SECONDS + 5}"]
    return subprocess.run([*within, str(program), *arguments], capture_output=True, text=True)


def failure(program: Path, *arguments: str) -> str:
    """How a program of `build` fails: see `how_failed`."""
    return how_failed(run(program, *arguments))


def how_failed(done: subprocess.CompletedProcess[str]) -> str:
    """How a program failed: "value", "sanitizer" or "hang", and "" where it did not.

    A program says by its exit status 1 that a value is wrong.
    raises: Crash.
    """
    said = done.stdout + done.stderr
    if "Sanitizer" in said or "runtime error:" in said:
        return "sanitizer"
    # Threads wait for others that never come, or meet where they must not; or none ever ends.
    if "simt: " in said or done.returncode == -signal.SIGXCPU:
        return "hang"
    if done.returncode not in (0, 1):
        raise Crash(said)
    return "value" if done.returncode else ""
