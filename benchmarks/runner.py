"""Checks contestants, then times them in alternation in one process, then measures their memory.

Nothing is timed whose results are wrong. A round runs every contestant once, each round starting
with another one, so that whatever drifts on a machine drifts for all. Times are wall time and the
CPU time of all threads. Memory is the peak of resident memory above what was there before the
call, the results included, in a fresh process for each contestant.
"""

import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import CORES
from entropy_kernels.testing import Watch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
QUANTILES = (20, 50, 80)
# The largest error relative to the truth's norm: where all is fp32; where results alone are rounded
# to 16 bits; and where logits are, whose spacing in bf16 is 1/4 at the size of a peaked row's.
FP32, ROUNDED_ONCE, ROUNDED_LOGITS = 1e-3, 1e-2, 0.25

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute a step."""

    name: str
    """Unique, for files and the command line."""
    label: str
    """What a table says."""
    run: Callable[[Any], Results]
    """From a problem to named results, some of those that the truth has."""
    setting: dict[str, Any] = field(default_factory=dict)
    """What the truth depends on besides the problem."""
    exact: bool = False
    """Whether logits are fp32 when inputs have 16 bits."""
    uncompiled: Callable[[Any], Results] | None = None
    """Where `run` is compiled: what it was compiled from, whose products are counted."""
    needs: tuple[str, ...] = ()
    """Modules without which it is listed and not run."""


class RefusedError(Exception):
    """What a contestant raises that cannot compute the problem, with the reason."""


class WrongResultError(RefusedError):
    """Results too far from the truth for their speed to mean anything."""


def check(
    contestant: Contestant, results: Results, truth: Results, dtype: torch.dtype
) -> dict[str, float]:
    """The error of each result, relative to the truth's norm, or WrongResultError."""
    allowed = ROUNDED_ONCE if contestant.exact else ROUNDED_LOGITS
    allowed = FP32 if dtype == torch.float32 else allowed
    errors = {}
    for name, got in results.items():
        wanted = truth[name].double()
        # A loss is a sum of terms of both signs and of size 1: its own size is no scale.
        scale = 1.0 if wanted.ndim == 0 else float(wanted.norm())
        errors[name] = float((got.double() - wanted).norm()) / scale
        if not errors[name] <= allowed:
            raise WrongResultError(f"{name} is off by {errors[name]:.2g}; {allowed} is allowed")
    return errors


def run_suite(
    contestants: Sequence[Contestant],
    problem: Any,
    truth: Callable[..., Results],
    *,
    rounds: int,
    dtype: torch.dtype,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One entry a contestant: its error, products and samples; or why it was refused."""
    entries = {c.name: {"name": c.name, "label": c.label} for c in contestants}
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
                errors = check(contestant, contestant.run(problem), wanted, dtype)
            except RefusedError as reason:
                entry["refused"] = str(reason)
                log(f"{contestant.name}: refused, {reason}")
                continue
            entry["errors"], entry["error"] = errors, max(errors.values(), default=0.0)
            with Watch() as watch:
                (contestant.uncompiled or contestant.run)(problem)
            entry["flops"] = 2 * watch.products
            passed.append(contestant)
            log(f"{contestant.name}: error {entry['error']:.1e}, {entry['flops']:.3g} flops")
    passed.sort(key=contestants.index)
    for name, samples in alternate(passed, problem, rounds, log).items():
        entries[name] |= samples
    return list(entries.values())


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
    gc.collect()
    # What is here by now, libraries above all, need not be searched again before every sample.
    gc.freeze()
    try:
        for number in range(rounds):
            _round(contestants, problem, number, samples)
            if (number + 1) % max(rounds // 10, 1) == 0:
                last = ", ".join(f"{name} {x['wall_s'][-1]:.3g}" for name, x in samples.items())
                log(f"round {number + 1} of {rounds}, seconds: {last}")
    finally:
        gc.unfreeze()
    return samples


def _round(
    contestants: Sequence[Contestant],
    problem: Any,
    number: int,
    samples: dict[str, dict[str, list[float]]],
) -> None:
    first = number % max(len(contestants), 1)
    for place, contestant in enumerate([*contestants[first:], *contestants[:first]]):
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        results = contestant.run(problem)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        del results
        turn = number * len(contestants) + place
        for name, value in {"wall_s": wall, "cpu_s": cpu, "turn": turn}.items():
            samples[contestant.name][name].append(value)


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


def about_this_run() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "machine": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": _versions("torch", "trl", "liger-kernel", "cut-cross-entropy"),
        "environment": {name: x for name, x in os.environ.items() if name.startswith("OMP_")},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write(folder: Path, about: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    """One result file, named after op, device, dtype and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(str(size) for size in about["shape"].values())
    path = folder / f"{about['op']}-{about['device']}-{about['dtype']}-{shape}.json"
    path.write_text(json.dumps(about | {"contestants": entries}, indent=1) + "\n")
    return path


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    name = found.get("model name", platform.machine())
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Short, with -dirty where the code that was measured is not the commit's."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True).strip()
        measured = ["entropy_kernels", "csrc", "benchmarks/*.py"]
        changed = subprocess.check_output([*git, "status", "--porcelain", "--", *measured])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head
