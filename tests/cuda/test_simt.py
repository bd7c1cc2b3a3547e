"""The layer that runs CUDA kernels on the host: right kernels pass, and each fault is seen."""

import re
import subprocess

import pytest

from . import host

RIGHT = [
    "shuffles",
    "masks",
    "atomics",
    "neighbours",
    "lanes through memory",
    "last block",
    "indices",
    "two launches",
]
# Name, sanitizer, seed, how it is noticed and what is said.
BROKEN = [
    ("no barrier", "thread", 0, "sanitizer", "data race"),
    ("no second barrier", "thread", 0, "sanitizer", "data race"),
    ("shuffle for a barrier", "thread", 0, "sanitizer", "data race"),
    ("race of blocks", "thread", 0, "sanitizer", "data race"),
    ("not atomic", "thread", 0, "sanitizer", "data race"),
    ("no fence before", "thread", 0, "sanitizer", "data race"),
    ("no fence after", "thread", 0, "sanitizer", "data race"),
    ("past static", "address", 0, "sanitizer", "heap-buffer-overflow"),
    ("past dynamic", "address", 0, "sanitizer", "heap-buffer-overflow"),
    ("divergent", "", 0, "hang", "32 at .*__syncthreads, 32 at the end"),
    ("ended lanes", "", 0, "hang", "32 at .*__shfl_xor_sync, 32 at the end"),
    ("two barriers", "", 0, "hang", "is at .*__syncthreads.* where others wait at"),
    ("two instructions", "", 0, "hang", "is at .*__shfl_sync.* where others wait at .*ballot"),
    ("not in its mask", "", 0, "hang", "lane 16 is not in its own mask 0000ffff"),
    ("odd width", "", 0, "hang", "width must be a power of two up to 32; got 12"),
    ("part of a warp", "", 0, "hang", "blocks of 33 threads are not whole warps"),
    ("too many threads", "", 0, "hang", "no GPU launches"),
    ("lane outside the mask", "", 0, "value", ""),
    ("unwritten", "", 0, "value", ""),
    ("unwritten", "", 1, "value", ""),
    ("unwritten dynamic", "", 0, "value", ""),
    ("unwritten dynamic", "", 1, "value", ""),
    ("in order", "", 2, "value", ""),
    ("nothing in between", "", 1, "value", ""),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A program per sanitizer."""
    folder, source = tmp_path_factory.mktemp("simt"), [host.HERE / "simt_host.cpp"]
    return {
        sanitizer: host.build(folder / f"with_{sanitizer}", source, sanitizer=sanitizer)
        for sanitizer in host.SANITIZERS
    }


@pytest.mark.parametrize("sanitizer", host.SANITIZERS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(programs, name, sanitizer):
    assert host.failure(programs[sanitizer], name, *"0123") == ""


@pytest.mark.parametrize(("name", "sanitizer", "seed", "how", "text"), BROKEN)
def test_broken_kernels_fail(programs, name, sanitizer, seed, how, text):
    done = host.run(programs[sanitizer], name, str(seed))
    assert host.how_failed(done) == how
    assert re.search(text, done.stdout + done.stderr)


@pytest.mark.parametrize("name", ["in order", "nothing in between"])
def test_without_a_seed_threads_run_in_order(programs, name):
    assert host.failure(programs[""], name, "0") == ""


def test_what_does_not_compile_is_no_failure(tmp_path):
    mutant = host.Mutant("nonsense", "block_scan.h", "#pragma once", "nonsense;")
    with pytest.raises(host.DoesNotCompile, match="nonsense"):
        host.build(tmp_path, [host.HERE / "selection_host.cpp"], mutant=mutant)


def test_a_crash_is_no_failure():
    done = subprocess.run(["sh", "-c", "kill -SEGV $$"], capture_output=True, text=True)
    with pytest.raises(host.Crash):
        host.how_failed(done)


def test_a_mutant_stands_in_one_place(tmp_path):
    mutant = host.Mutant("twice", "block_scan.h", "no such text", "")
    with pytest.raises(AssertionError, match="twice: 0 places"):
        host.build(tmp_path, [host.HERE / "selection_host.cpp"], mutant=mutant)
