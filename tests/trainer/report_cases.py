"""Synthetic runs for the tests of the report, and a terminal."""

import io
import json
import math
import random
import sys
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.log import RunLog, Sample

WORDS = ["<think>", "\n", "Since", " the", " sum", " is", " 12", ",", " try", " 7", "+", "5", "."]
PROMPT = "Reach 24 from 3, 5, 7 and 9 with + - * /.\nAnswer in one line."


def metrics_row(rng: random.Random, step: int, steps: int) -> dict[str, float]:
    """What a healthy run logs at `step`: entropies fall, reward rises, both with noise."""
    done = step / steps
    tau = 0.9 - 0.35 * done + rng.gauss(0, 0.03)
    seconds, rows = 2.4 + rng.gauss(0, 0.1), rng.randint(9000, 11000)
    right = min(max(0.3 + 0.4 * (1 - math.exp(-3 * done)) + rng.gauss(0, 0.04), 0), 1)
    truncated = 0.05 * math.exp(-3 * done) * rng.random()
    unparsed = (1 - right - truncated) * 0.3 * math.exp(-6 * done)
    useful = rng.randint(22, 32)
    return {
        "step": step,
        "reward/mean": right,
        "reward/timeouts": 0.0,
        "reward/crashes": 0.0,
        "response/count": 256.0,
        "response/length": 31 + 9 * done + rng.gauss(0, 1.2),
        "response/truncated": truncated * 1.2,
        "kind/right": right,
        "kind/wrong": 1 - right - truncated - unparsed,
        "kind/truncated": truncated,
        "kind/unparsed": unparsed,
        "kind/unverified": 0.0,
        "groups/sampled": 32.0,
        "groups/useful": float(useful),
        "groups/all_right": float((32 - useful) * right // 1),
        "groups/all_wrong": float(32 - useful - (32 - useful) * right // 1),
        "entropy/mean": 0.32 - 0.1 * done + rng.gauss(0, 0.01),
        "entropy/p50": 0.05 - 0.03 * done,
        "entropy/p80": tau,
        "entropy/p95": 1.7 - 0.4 * done + rng.gauss(0, 0.04),
        "entropy/threshold": tau,
        "entropy/selected_fraction": 0.2 + rng.gauss(0, 0.003),
        "entropy/selected_mean": tau + 0.4,
        **({} if step % 20 else {"mask/overlap": 0.97, "mask/shared": 0.985}),
        "head/rows": rows,
        "head/active_rows": rows // 5,
        "clip/low": abs(rng.gauss(0.006, 0.002)),
        "clip/high": abs(rng.gauss(0.011, 0.003)),
        "loss": rng.gauss(0, 0.02),
        "updates": 4.0,
        "grad_norm": abs(rng.gauss(0.5, 0.1)) * (60 if rng.random() < 0.001 else 1),
        "mismatch/kl": abs(rng.gauss(2e-4, 1e-4)),
        "mismatch/max_ratio": 1 + abs(rng.gauss(0.3, 0.3)),
        "mismatch/difference": abs(rng.gauss(0.01, 0.002)),
        "tokens_per_second": rows / seconds,
        "lr": 1e-6,
        "time/step": seconds,
        "time/sample": 0.55 * seconds,
        "time/score": 0.1 * seconds,
        "time/update": 0.35 * seconds,
        "time/head": seconds * (0.12 + rng.gauss(0, 0.01)),
    }


def skipped_row(rng: random.Random, step: int) -> dict[str, float]:
    """Metrics of a step with a wrong template: nearly everything is cut off or cannot be read."""
    cut = 0.7 + 0.1 * rng.random()
    return {
        "step": step,
        "reward/mean": 0.0,
        "reward/timeouts": float(rng.random() < 0.1),
        "reward/crashes": 0.0,
        "response/count": 256.0,
        "response/length": 44 + rng.gauss(0, 1),
        "response/truncated": cut,
        "kind/right": 0.0,
        "kind/wrong": 0.02,
        "kind/truncated": cut,
        "kind/unparsed": 0.98 - cut,
        "kind/unverified": 0.0,
        "groups/sampled": 32.0,
        "groups/useful": 0.0,
        "groups/all_right": 0.0,
        "groups/all_wrong": 32.0,
        "groups/wanted": 4.0,
        "skipped/few_groups": 1.0,
        "time/sample": 1.3,
        "time/step": 1.3,
    }


def evaluation(rng: random.Random, done: float, names: tuple[str, ...] = ("",)) -> dict[str, float]:
    """Accuracies on the held-out set, "", and on named ones."""
    found = {"time/evaluate": 3.0}
    for place, name in enumerate(names):
        prefix, count = f"eval/{name}." if name else "eval/", 512 if not name else 30
        value = 0.31 - 0.1 * place + 0.3 * (1 - math.exp(-3 * done)) + rng.gauss(0, 0.01)
        half = 1.96 * math.sqrt(value * (1 - value) / count)
        found |= {
            f"{prefix}accuracy": value,
            f"{prefix}low": max(value - half, 0.0),
            f"{prefix}high": value + half,
            f"{prefix}greedy": value + 0.07,
            f"{prefix}problems": count,
            f"{prefix}length": 31 + 9 * done,
        }
    return found


def samples(rng: random.Random, heat: float, count: int = 6, length: int = 70) -> list[Sample]:
    """Right and wrong ones in turn, trained on."""
    rows = []
    for i in range(count):
        tokens = [rng.choice(WORDS) for _ in range(length)]
        entropy = [rng.expovariate(1 / heat) for _ in tokens]
        selected = [h > 1.6 * heat for h in entropy]
        kind = ("wrong", "right")[i % 2]
        rows.append(Sample(PROMPT, "".join(tokens), float(i % 2), tokens, entropy, selected, kind))
    return rows


def unscored(rng: random.Random, length: int = 70) -> list[Sample]:
    """Samples of a skipped step."""
    rows = []
    for kind in ("wrong", "truncated", "unparsed", "truncated"):
        tokens = [rng.choice(WORDS) for _ in range(length)]
        rows.append(Sample(PROMPT, "".join(tokens), 0.0, tokens, [], [], kind))
    return rows


def make_run(
    folder: Path,
    steps: int = 120,
    done: int | None = None,
    every: int = 20,
    names: tuple[str, ...] = ("",),
    skip: float = 0.0,
    length: int = 70,
) -> RunLog:
    """A run as the trainer logs it, `done` of its steps, a share `skip` of them skipped."""
    rng = random.Random(0)
    log = RunLog.open(folder, Config(name=folder.name, steps=steps), device="a test")
    rows = []
    for step in range((steps if done is None else done) + 1):
        skipped = rng.random() < skip
        row: dict[str, float] = {"step": step}
        if step:
            row = skipped_row(rng, step) if skipped else metrics_row(rng, step, steps)
        if step % every == 0:
            row |= evaluation(rng, step / steps * (1 - skip), names)
        rows.append(row)
        if step == 1 or (step and step % every == 0):
            heat = 0.4 - 0.2 * step / steps
            size = length if step in (1, steps) else 30
            some = unscored(rng, size) if skipped else samples(rng, heat, length=size)
            log.samples(step, some)
    log.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return log


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is drawn on a terminal of 120 columns, which is stdout and stderr from now on."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    drawn = Terminal()
    monkeypatch.setattr(sys, "stdout", drawn)
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return drawn
