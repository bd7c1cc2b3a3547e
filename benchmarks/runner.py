"""Checks contestants, then times them in alternation in one process, then measures their memory.

Nothing is timed whose results are wrong. A round runs every contestant once, each round starting
with another one, so that whatever drifts on a machine drifts for all. Times are wall time and the
CPU time of all threads. Memory is the peak of resident memory above what was there before the
call, the results included, in a fresh process for each contestant.
"""

import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import CORES
from benchmarks.sources import ROOT, commit, versions
from entropy_kernels._bench import machine
from entropy_kernels._bench import rounds as rounds_of
from entropy_kernels._bench.contestant import (
    Contestant,
    RefusedError,
    Results,
    WrongResultError,
    check,
)
from entropy_kernels._bench.result_text import result_text
from entropy_kernels.testing import Watch

__all__ = ["Contestant", "RefusedError", "Results", "WrongResultError", "check"]

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def run_suite(
    contestants: Sequence[Contestant],
    problem: Any,
    truth: Callable[..., Results],
    *,
    rounds: int,
    dtype: torch.dtype,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One entry per contestant: its error, products and samples, or why it was refused."""
    entries = {
        c.name: {"name": c.name, "label": c.label}
        | ({"computes": c.computes} if c.computes else {})
        for c in contestants
    }
    passed, present = [], []
    for contestant in contestants:
        missing = [name for name in contestant.needs if find_spec(name) is None]
        if missing:
            entries[contestant.name]["refused"] = f"needs {' and '.join(missing)}"
        else:
            present.append(contestant)
    for setting in _distinct(c.setting for c in present):
        wanted = truth(problem, **setting)
        for contestant in present:
            if contestant.setting != setting:
                continue
            entry = entries[contestant.name]
            try:
                errors = check(contestant.run(problem), wanted, dtype, exact=contestant.exact)
            except RefusedError as reason:
                entry["refused"] = str(reason)
                log(f"{contestant.name}: refused, {reason}")
                continue
            entry["errors"], entry["error"] = errors, max(errors.values(), default=0.0)
            with Watch() as watch:
                (contestant.counted or contestant.uncompiled or contestant.run)(problem)
            entry["flops"] = 2 * watch.products
            passed.append(contestant)
            log(f"{contestant.name}: error {entry['error']:.1e}, {entry['flops']:.3g} flops")
    passed.sort(key=contestants.index)
    for name, samples in alternate(passed, problem, rounds, log).items():
        entries[name] |= samples
    return list(entries.values())


def measure(
    op: str,
    shape: dict[str, int],
    contestants: Sequence[Contestant],
    problem: Any,
    truth: Callable[..., Results],
    *,
    rounds: int,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = print,
    watched: int | None = 0,
    module: str = "",
    more: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **facts: Any,
) -> list[dict[str, Any]]:
    """Run a suite and write its result file into `folder`; the file's entries.

    watched: how many contestants have their memory measured, None for all; `module` has them.
    more: what an entry that was timed has besides. facts: what the file says besides.
    """
    about = about_this_run(dtype) | {"op": op, "device": "cpu", "shape": shape, **facts}
    log(f"{op}, {about['dtype']}, " + ", ".join(f"{name} {size}" for name, size in shape.items()))
    entries = run_suite(contestants, problem, truth, rounds=rounds, dtype=dtype, log=log)
    timed = [entry for entry in entries if "wall_s" in entry]
    names = [entry["name"] for entry in timed][:watched]
    peaks = peak_bytes(module, names, problem) if names else {}
    for entry in timed:
        entry |= more(entry) if more else {}
        if module:
            entry["peak_bytes"] = peaks.get(entry["name"])
    log(f"wrote {write(folder, about | {'rounds': rounds}, entries)}")
    return entries


def _distinct(settings: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for setting in settings:
        if setting not in found:
            found.append(setting)
    return found


def alternate(
    contestants: Sequence[Contestant], problem: Any, rounds: int, log: Callable[[str], None] = print
) -> dict[str, dict[str, list[float]]]:
    """Seconds of wall and CPU time, and the turn in which each sample was taken."""
    samples: dict[str, dict[str, list[float]]] = {
        c.name: {"wall_s": [], "cpu_s": [], "turn": []} for c in contestants
    }
    runs = {c.name: partial(c.run, problem) for c in contestants}
    for name, sample in rounds_of.alternate(runs, CPU, rounds):
        for key, value in sample._asdict().items():
            samples[name][key].append(value)
        number, place = divmod(sample.turn, len(contestants))
        if place == len(contestants) - 1 and (number + 1) % max(rounds // 10, 1) == 0:
            last = ", ".join(f"{name} {x['wall_s'][-1]:.3g}" for name, x in samples.items())
            log(f"round {number + 1} of {rounds}, seconds: {last}")
    return samples


def peak_bytes(module: str, names: Sequence[str], problem: Any) -> dict[str, int]:
    """Peak resident memory above the inputs, of each contestant of `module`; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        torch.save(tuple(problem), path)
        found = {}
        for name in names:
            command = [sys.executable, "-m", "benchmarks.peak_memory", module, str(path), name]
            done = subprocess.run(
                command,
                cwd=ROOT,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                # This process is bound to one core, its children need not be.
                preexec_fn=lambda: os.sched_setaffinity(0, CORES),
            )
            found[name] = int(done.stdout.split()[-1])
    return found


def about_this_run(dtype: torch.dtype) -> dict[str, Any]:
    """Machine, instruction set and libraries for `dtype`; versions, commit and date."""
    return machine.about(dtype) | {
        "dtype": str(dtype).removeprefix("torch."),
        "fp32_products": torch.get_float32_matmul_precision(),
        "versions": versions(["torch", "trl", "liger-kernel", "cut-cross-entropy"]),
        "environment": {name: x for name, x in os.environ.items() if name.startswith("OMP_")},
        "commit": commit("entropy_kernels", "csrc", "benchmarks/*.py"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write(folder: Path, about: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    """One result file, named after op, device, dtype, shape and the processor's make."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(str(size) for size in about["shape"].values())
    name = "-".join([about["op"], about["device"], about["dtype"], shape])
    path = folder / f"{name}-{about['processor']['slug']}.json"
    path.write_text(result_text(about | {"contestants": entries}))
    return path
