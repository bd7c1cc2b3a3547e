"""Contestants in alternation: time, on a GPU by events and on a CPU by the clock; peak memory."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Sample(NamedTuple):
    """One call: its turn among all calls, its seconds, and the CPU seconds of all threads."""

    turn: int
    wall_s: float
    cpu_s: float


def alternate(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
) -> Iterator[tuple[str, Sample]]:
    """Every round runs each once, and starts with another one: what drifts, drifts for all."""
    names = list(runs)
    gc.collect()
    # What is here by now, libraries above all, need not be searched again before every sample.
    gc.freeze()
    try:
        for number in range(rounds):
            first = number % max(len(names), 1)
            for place, name in enumerate(names[first:] + names[:first]):
                gc.collect()
                wall, cpu = once(runs[name], device)
                yield name, Sample(number * len(names) + place, wall, cpu)
    finally:
        gc.unfreeze()


def once(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, everything it started included, and CPU seconds; no freeing."""
    cpu = time.process_time()
    if device.type != "cuda":
        wall = time.perf_counter()
        results = run()
        wall = time.perf_counter() - wall
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        results = run()
        end.record()
        end.synchronize()
        wall = begin.elapsed_time(end) / 1e3
    cpu = time.process_time() - cpu
    del results
    return wall, cpu


def why_no_peak(device: torch.device) -> str | None:
    """Why peak memory is not measured there; None where it is."""
    if device.type == "cuda" or _CLEAR_REFS.exists():
        return None
    return f"only Linux tells the peak of resident memory; this is {platform.system()}"


def peak_of(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """A call's results and the bytes it needed at most, the results included.

    On a GPU above what the allocator had given out before; on a CPU, resident memory above what was
    there. The caller has asked `why_no_peak`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = run()
        torch.cuda.synchronize(device)
        return results, torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")
    before = status("VmRSS")
    results = run()
    return results, status("VmHWM") - before


def status(key: str) -> int:
    """Bytes of this process, from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
