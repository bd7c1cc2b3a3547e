"""A pretrained model's own answers: TRL's step and the trainer's, the head alone, and memory.

pytest benchmarks/bench_real_model.py --benchmark-only --model FOLDER

All steps share one model with AdamW's moments and alternate in one process: forward, loss,
backward, clipping and AdamW on answers that are there, fp32, checkpointed layers, one micro-batch.
The learning rate is 0, so every step finds the same model. Nothing wrong is timed: losses and
gradients are those of the same trainer's step with all logits.
"""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from benchmarks import linear_logprob_entropy as op
from benchmarks import peers, runner
from benchmarks.real_model.answers import real_bench
from benchmarks.real_model.trl_step import TrlStep
from benchmarks.sampler_step import PARTS, Bench, Parts, eager, ours
from benchmarks.step_rounds import Step, error, in_alternation
from entropy_kernels._bench.step import Problem, problem_of
from entropy_kernels.testing import Watch
from trainer.batch import pack

# Answers and their longest length, with rounds.
SIZES = {(8, 128): 3}
QUICK = (4, 8), 2

# Label, step, and the contestant whose loss and gradient it must have.
OF_THE_TRAINER: dict[str, tuple[str, Step, str]] = {
    "eager": ("our trainer on all logits, scoring pass", eager, "eager"),
    "eager-all": ("the same, all tokens", partial(eager, fraction=1.0), "eager-all"),
    "eager-support": (
        "the same, logits outside of the kept sets -inf",
        partial(eager, truncated=True),
        "eager-support",
    ),
    "ours-all": ("ours, all tokens", partial(ours, source="old", fraction=1.0), "eager-all"),
    "ours": ("ours, 20%, scoring pass", partial(ours, source="old"), "eager"),
    "ours-mask": (
        "ours, 20%, mask by the sampler's entropies",
        partial(ours, source="mask"),
        "eager",
    ),
    "ours-known": (
        "ours, 20%, the sampler's log-probs and entropies",
        partial(ours, source="sampler"),
        "eager",
    ),
    "ours-support": (
        "ours, the same over the kept sets",
        partial(ours, source="sampler", truncated=True),
        "eager-support",
    ),
}
# The head alone: those of linear_logprob_entropy that compute, or are asked for, something else.
HEADS = ("eager", "compile", "cce", "trl", "lce", "liger", "cpu-1", "cpu-0.2", "cpu-0.2-known")


def contestants(bench: Bench) -> dict[str, tuple[str, Step, str]]:
    """All steps; TRL's where it is installed."""
    found = dict(OF_THE_TRAINER)
    if not peers.why_not("trl"):
        step = TrlStep(bench)
        label = "TRL's GRPOTrainer, training part"
        found = {
            "trl": (label, partial(step, patched=False), "trl"),
            "trl-patched": (f"{label}, patch_trl()", partial(step, patched=True), "trl"),
        } | found
    return found


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}-L{}".format(*size))
def bench_real_model(size, model, start, record):
    size, rounds = start(SIZES, size, QUICK)
    record(functools.partial(measure, model, size, rounds))


def measure(
    model: Path, size: tuple[int, int], rounds: int, folder: Path, log: Any = print
) -> list[dict[str, Any]]:
    """The entries of the result file of the steps; that of the head is beside it."""
    bench = real_bench(model, *size)
    about = runner.about_this_run(torch.float32) | {"op": "real_step", "device": "cpu"}
    about |= {"rounds": rounds, "shape": shape_of(bench), "bytes": held(bench)}
    about["model"] = type(bench.policy.model).__name__
    log("steps of a pretrained model, " + ", ".join(f"{n} {x}" for n, x in about["shape"].items()))
    all_of_them = contestants(bench)
    steps = {name: step for name, (_, step, _) in all_of_them.items()}
    entries = {
        name: {"name": name, "label": label} | counted(bench, steps[name])
        for name, (label, _, _) in all_of_them.items()
    }
    for name, (_, _, truth) in all_of_them.items():
        entries[name]["error"] = error(entries[name]["sums"], entries[truth]["sums"])
        log(f"{name}: {entries[name]['sums']}, error {entries[name]['error']:.1e}")
    in_alternation(bench, steps, entries, rounds, log)
    log(f"wrote {runner.write(folder, about, list(entries.values()))}")
    return list(entries.values()) + measure_head(bench, rounds, folder, log)


def counted(bench: Bench, step: Step) -> dict[str, Any]:
    """Loss and norm of the gradient, and the products of each part."""
    with Watch() as watch:
        parts = Parts(watch)
        sums = bench.run(step, parts)
    return {"sums": sums, "products": {part: parts.counts.get(part, 0) for part in PARTS}}


def shape_of(bench: Bench) -> dict[str, Any]:
    """What the file is named after, and how many tokens there are."""
    vocabulary, hidden = bench.weight.shape
    return {
        "model": bench.policy.model.config.model_type,
        "sequences": len(bench.rollouts),
        "tokens": len(bench.rollouts.sampler_logprob_T),
        "hidden": hidden,
        "vocabulary": vocabulary,
    }


def held(bench: Bench) -> dict[str, int]:
    """Bytes that every step needs: weights and moments, which are there before, and gradients."""
    weights = sum(p.nbytes for p in bench.policy.model.parameters())
    return {"weights": weights, "moments": 2 * weights, "gradients": weights}


def measure_head(bench: Bench, rounds: int, folder: Path, log: Any = print) -> list[dict[str, Any]]:
    """The entries of the head alone, on the states of the same answers."""
    problem = head_problem(bench)
    named = [c for c in op.contestants(("cpu",)) if c.name in HEADS]
    shape = shape_of(bench)
    return runner.measure(
        "real_head", shape, named, problem, op.truth, rounds=rounds, folder=folder, log=log
    )


@torch.no_grad()
def head_problem(bench: Bench) -> Problem:
    """The step of linear_logprob_entropy on the states that predict the bench's answers."""

    def states(head: ek.Head) -> Problem:
        hidden, weight = head.hidden.detach().clone(), head.weight.detach()
        with torch.enable_grad():
            return problem_of(hidden, weight, bench.rollouts.response_T, op.FRACTIONS)

    bench.policy.train(False)
    return bench.policy(pack(bench.rollouts, bench.policy.layout), 1.0, states)
