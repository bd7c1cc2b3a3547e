"""A run that is killed with SIGKILL at random moments and resumed, against one that is not.

python -m benchmarks.fault_run [--kills 20] [--ranks 2] [PRESET] [--options of the trainer]

The moments are drawn over the whole run: a step, and a part of its time; every fourth is moved into
the next checkpoint, which takes too little time to be hit by chance. With several ranks any one of
them, or all with their launcher, is killed, the others up to a second later. In the end
metrics (without times), samples, weights and the optimizer's state must be equal, bit for bit.
Writes benchmarks/results/fault_run.json; the exit status says whether all was equal. Linux only.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.sources import processes
from entropy_kernels._bench.result_text import result_text
from trainer import checkpoint
from trainer.checkpoint.sharded import read_whole
from trainer.log import read_rows
from trainer.ranks import Ranks

RESULT = Path(__file__).parent / "results" / "fault_run.json"
ALONE = Ranks(torch.device("cpu"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    options, rest = parser.parse_known_args(arguments)
    root = options.keep or Path(tempfile.mkdtemp(prefix="fault_run-"))
    command = _command(options.ranks, root, rest)
    began = time.monotonic()
    subprocess.run([*command, "--name", "whole"], check=True)
    seconds = time.monotonic() - began
    kills = _kill_and_resume(
        [*command, "--name", "killed"], root / "killed", root / "whole", options
    )
    equal = compare(root / "killed", root / "whole")
    result = {
        "command": ["trainer", "train", *rest],
        "ranks": options.ranks,
        "seconds_uninterrupted": round(seconds, 1),
        "kills": kills,
        "kills_while_saving": sum(kill["saving"] for kill in kills),
        "equal": equal,
        "sha256": {name: digests(root / name) for name in ("whole", "killed")},
        "started": json.loads((root / "whole" / "run.json").read_text())["starts"][0],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(result_text(result))
    print(f"{len(kills)} kills; equal: {equal}; {options.out}")
    if not options.keep:
        shutil.rmtree(root)
    return int(len(kills) < options.kills or not all(equal.values()))


def compare(killed: Path, whole: Path) -> dict[str, bool]:
    """Which parts of two runs' folders are equal to the bit."""
    return {
        "metrics": _metrics(killed) == _metrics(whole),
        "samples": _samples(killed) == _samples(whole),
        **{name: digest == digests(whole)[name] for name, digest in digests(killed).items()},
    }


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of the weights, the optimizer's tensors and the progress of the last checkpoint."""
    last = checkpoint.latest(run, ALONE)
    if last is None:
        raise SystemExit(f"{run} has no checkpoint")
    found = {"progress": hashlib.sha256((last / "state.json").read_bytes()).hexdigest()}
    for name, folder in (("weights", last), ("optimizer", last / checkpoint.OPTIMIZER)):
        digest = hashlib.sha256()
        # Before the first update there is no optimizer's state.
        tensors = read_whole(folder) if folder.exists() else {}
        for key, value in sorted(tensors.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found


def _command(ranks: int, root: Path, rest: list[str]) -> list[str]:
    module = [sys.executable, *processes(ranks), "trainer", "train"]
    preset = [rest[0]] if rest and not rest[0].startswith("-") else []
    return [*module, *preset, "--root", str(root), *rest[len(preset) :]]


def _kill_and_resume(
    command: list[str], run: Path, whole: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Runs `command` until it ends; returns the moments at which it was killed."""
    moments = random.Random(options.seed)
    rows = read_rows(whole / "metrics.jsonl")
    times = [row.get("time/step", 0.0) + row.get("time/evaluate", 0.0) for row in rows]
    points = sorted(moments.uniform(0, len(rows) - 1) for _ in range(options.kills))
    kills: list[dict[str, Any]] = []
    for i, point in enumerate(points):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        _wait_for_step(process, run, int(point))
        if i % 4 == 3:
            _wait_for_save(process, run)
            time.sleep(moments.uniform(0, 0.05))
        else:
            # A step's row is written before its checkpoint: wait from there into the next step.
            time.sleep((point - int(point)) * (times[int(point) + 1] + 0.1))
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself, status {process.returncode}")
        victim = _kill(process, moments, options.ranks)
        last = checkpoint.latest(run, ALONE)
        saving = any((run / "checkpoints").glob(".unfinished-*"))
        kills.append(
            {
                "after_step": int(point),
                "victim": victim,
                "saving": saving,
                "resumed_from": last and last.name,
            }
        )
        print(kills[-1], flush=True)
    subprocess.run(command, check=True)
    return kills


def _wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the run has written the row of `step`; rows of an earlier start count once redone."""
    path = run / "metrics.jsonl"
    old = path.stat().st_ino if path.exists() else None
    while process.poll() is None:
        # Resuming replaces the file, without the rows that are to be done again.
        if path.exists() and path.stat().st_ino != old:
            rows = read_rows(path)
            if rows and rows[-1]["step"] >= step:
                return
        time.sleep(0.005)


def _wait_for_save(process: subprocess.Popen, run: Path) -> None:
    """Until the run has begun a checkpoint; what an earlier start left of one does not count."""
    old = set((run / "checkpoints").glob(".unfinished-*"))
    while process.poll() is None and not set((run / "checkpoints").glob(".unfinished-*")) - old:
        time.sleep(0.001)


def _kill(process: subprocess.Popen, moments: random.Random, ranks: int) -> str:
    """SIGKILL one rank, then the rest up to a second later; or all processes at once."""
    workers = _children(process.pid) if ranks > 1 else []
    victim = moments.choice(["all", *(f"process {i}" for i in range(len(workers)))])
    if victim != "all":
        os.kill(workers[int(victim.split()[1])], signal.SIGKILL)
        time.sleep(moments.uniform(0, 1))
    for pid in (process.pid, *workers):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended when the first was killed
    process.wait()
    return victim


def _children(parent: int) -> list[int]:
    """Process ids of the children of `parent`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return sorted(found)


def _samples(run: Path) -> bytes:
    """A run whose steps were all skipped has none."""
    path = run / "samples.jsonl"
    return path.read_bytes() if path.exists() else b""


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The rows without what a clock says."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for row in read_rows(run / "metrics.jsonl")
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
