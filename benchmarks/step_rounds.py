"""Steps on one model in alternation, and whether they find what they should."""

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import runner
from benchmarks.sampler_step import CPU, PARTS, Bench, Parts
from entropy_kernels._bench import rounds as rounds_of

LARGEST_ERROR = 1e-4
# Advantages are about 1. A smaller mean of them is what is left where they cancel.
LEAST = 0.01

Step = Callable[[Bench], dict[str, float]]
"""A step: the loss and the norm of its gradient."""


def error(sums: dict[str, float], truth: dict[str, float]) -> float:
    """The largest error relative to the truth, or to LEAST; refused where it is too large."""
    found = max(abs(sums[k] - truth[k]) / max(abs(truth[k]), LEAST) for k in truth)
    if not found <= LARGEST_ERROR:
        raise runner.WrongResultError(f"{sums}, wanted {truth}")
    return found


def in_alternation(
    bench: Bench,
    steps: Mapping[str, Step],
    entries: Mapping[str, dict[str, Any]],
    rounds: int,
    log: Callable[[str], None],
) -> None:
    """Add to each step's entry the seconds and the peaks of its rounds, also by part."""
    for entry in entries.values():
        entry |= {"turn": [], "wall_s": [], "cpu_s": [], "parts_s": {}, "part_peak_bytes": {}}
    parts: dict[str, Parts] = {}

    def run(name: str) -> None:
        _trim()
        parts[name] = Parts()
        bench.run(steps[name], parts[name])

    runs = {name: partial(run, name) for name in steps}
    for name, sample in rounds_of.alternate(runs, CPU, rounds):
        _join(entries[name], sample, parts.pop(name))
        log(f"{name}: " + _in_short(entries[name]))


def _trim() -> None:
    """Gives free memory back to the system, so that it is no part of the next peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _join(entry: dict[str, Any], sample: rounds_of.Sample, parts: Parts) -> None:
    """Adds a round's sample to lists, and keeps the largest peaks."""
    for key, value in sample._asdict().items():
        entry[key].append(value)
    for name in PARTS:
        entry["parts_s"].setdefault(name, []).append(parts.seconds.get(name, 0.0))
    for name, peak in parts.peaks.items():
        entry["part_peak_bytes"][name] = max(entry["part_peak_bytes"].get(name, 0), peak)
    entry["peak_bytes"] = max(entry["part_peak_bytes"].values(), default=0)


def _in_short(entry: dict[str, Any]) -> str:
    parts = ", ".join(f"{n} {x[-1]:.3g}" for n, x in entry["parts_s"].items() if x[-1])
    return f"{entry['wall_s'][-1]:.3g} s ({parts}), {entry['peak_bytes'] / 1e6:,.0f} MB"
