"""One optimizer step of the trainer, backbone and all, with our head and with eager logits.

Forward, loss, backward, clipping and AdamW on responses that are there already, in fp32, with
activation checkpointing: the trainer's own code, and beside it a step of the same model that holds
all logits, with TRL's functions. The same step by TRL's kernels head; and by torch's, which has no
entropies and is told the mask. A Qwen3 of random weights and Qwen3-0.6B's shape, and one of a
quarter of its layers, where the head is nearly half of the step.

Each contestant runs in processes of its own, because two models with optimizers do not fit side by
side; rounds alternate. A process tells the seconds of its step and of its head, its peak of
resident memory, and which of that is weights, gradients and AdamW's moments.

B sequences, P prompt width, L response width, D hidden, V vocabulary.
"""

import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, runner, train_step
from benchmarks.environment import CORES
from benchmarks.train_step import Shape
from entropy_kernels._bench.rounds import status

MODULE = "benchmarks.bench_train_step"
LARGEST_ERROR = 1e-4


SHAPES = {Shape(2, 64, 960, 7, 1024, 151936): 3, Shape(2, 64, 960, 28, 1024, 151936): 1}
QUICK = Shape(2, 4, 12, 2, 32, 128), 2

# What each changes of the trainer's configuration; the first holds logits.
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("all logits, 20% of the tokens", {}),
    "trl": ("TRL's kernels head, 20% of the tokens", {}),
    "lce": ("torch's linear_cross_entropy, no entropies, 20% known beforehand", {}),
    "ours-all": ("ours, all tokens", {"fraction": 1.0}),
    "ours": ("ours, 20% of the tokens, current policy", {"entropy_source": "current"}),
    "ours-known": ("ours, 20% of the tokens, known beforehand", {"entropy_source": "old"}),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"layers{shape.layers}")
def bench_train_step(shape, start, record):
    record(functools.partial(measure, *start(SHAPES, shape, QUICK)))


def measure(shape: Shape, rounds: int, folder: Path, log=print) -> list[dict[str, Any]]:
    """The result file's entries."""
    about = runner.about_this_run(torch.float32) | {
        "op": "train_step",
        "device": "cpu",
        "shape": shape._asdict(),
        "rounds": rounds,
    }
    log("step of the trainer, " + ", ".join(f"{n} {x}" for n, x in about["shape"].items()))
    entries = {
        name: {"name": name, "label": label, "runs": []}
        for name, (label, _) in CONTESTANTS.items()
        if not peers.why_not(name)
    }
    names = list(entries)
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            entries[name]["runs"].append(_in_a_process(shape, name))
        log(f"round {number + 1} of {rounds}: " + _in_short(entries))
    wanted = entries["eager"]["runs"][0]["sums"]
    for entry in entries.values():
        join(entry, wanted)
        log(f"{entry['name']}: error {entry['error']:.1e}")
    found = list(entries.values()) + peers.refused(CONTESTANTS)
    log(f"wrote {runner.write(folder, about, found)}")
    return found


def _in_short(entries: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {e['runs'][-1]['wall_s']:.3g} s {e['runs'][-1]['peak_bytes'] / 1e6:,.0f} MB"
        for name, e in entries.items()
    )


def join(entry: dict[str, Any], wanted: dict[str, float]) -> None:
    """Samples of the rounds as lists; the largest of the memory; refused where it is wrong."""
    runs = entry.pop("runs")
    entry["sums"] = runs[0]["sums"]
    for key in ("wall_s", "cpu_s", "head_s"):
        entry[key] = [run[key] for run in runs]
    for key in ("peak_bytes", "weights_bytes", "gradients_bytes", "moments_bytes"):
        entry[key] = max(run[key] for run in runs)
    # All tokens are another loss, and have no eager step beside them.
    entry["error"] = 0.0
    if entry["name"] != "ours-all":
        entry["error"] = max(abs(entry["sums"][k] / wanted[k] - 1) for k in wanted)
    if not entry["error"] <= LARGEST_ERROR:
        raise runner.WrongResultError(f"{entry['name']}: {entry['sums']}, wanted {wanted}")


def _in_a_process(shape: Shape, name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", MODULE, name, *map(str, shape)],
        cwd=runner.ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, CORES),
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, *sizes: str) -> None:
    """Prints one step of one contestant as JSON."""
    train_step.Step(QUICK[0], name, CONTESTANTS[name][1]).run()  # loads libraries
    base = status("VmRSS")
    step = train_step.Step(Shape(*map(int, sizes)), name, CONTESTANTS[name][1])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    found = step.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps(found | {"wall_s": wall, "cpu_s": cpu, "peak_bytes": status("VmHWM") - base}))


if __name__ == "__main__":
    main(*sys.argv[1:])
