"""A training step with what the sampler knows: without a scoring pass, and over the kept sets.

A step on responses that are there, of Qwen3-0.6B's shape with a quarter of its layers and of Gemma
3 270M's shape, random weights, fp32, checkpointed layers, 20% of the tokens. Contestants: eager
logits with a scoring pass; the same by TRL's kernels head; by torch's linear_cross_entropy, which
has no entropies, with log-probs and entropies of the sampler; the trainer's step with a scoring
pass; the trainer's with those of the sampler; and that over sets of 8 ids in the mean, half of them
of one id. They share one model and alternate in one process. Products of the head are counted in a
first round, whose losses and gradients are compared; nothing wrong is timed.
"""

import functools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, runner
from benchmarks.sampler_step import FRACTION, PARTS, Bench, Parts, Shape, eager, ours, random_bench
from benchmarks.step_rounds import Step, error, in_alternation
from entropy_kernels._bench.others import torch_head, trl_head
from entropy_kernels.backends import STORED_LOGITS_BYTES
from entropy_kernels.high_entropy_policy_loss import LEAST_ROW_BYTES
from entropy_kernels.testing import Watch
from trainer.update import at_least

SHAPES = {
    Shape("qwen3", 2, 64, 704, 7, 1024, 151936): 3,
    Shape("gemma3", 2, 64, 704, 18, 640, 262144): 3,
}
QUICK = Shape("qwen3", 2, 4, 60, 2, 32, 512), 2
HEAD = ("scoring head", "head")

# The first holds logits; another's results are those of the step that its last part names.
CONTESTANTS: dict[str, tuple[str, Step]] = {
    "eager": ("all logits, scoring pass", eager),
    "trl": ("TRL's kernels head, scoring pass", partial(eager, head=trl_head)),
    "lce-known": (
        "torch's linear_cross_entropy, the sampler's log-probs and entropies",
        partial(eager, head=torch_head, known=True),
    ),
    "ours": ("ours, scoring pass", partial(ours, source="old")),
    "ours-known": ("ours, the sampler's log-probs and entropies", partial(ours, source="sampler")),
    "ours-support": (
        "ours, the same over the kept sets",
        partial(ours, source="sampler", truncated=True),
    ),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def bench_sampler_step(shape, start, record):
    record(functools.partial(measure, *start(SHAPES, shape, QUICK)))


def measure(shape: Shape, rounds: int, folder: Path, log=print) -> list[dict[str, Any]]:
    """The result file's entries."""
    about = runner.about_this_run(torch.float32) | {
        "op": "sampler_step",
        "device": "cpu",
        "shape": shape._asdict(),
        "rounds": rounds,
    }
    log("step with a sampler, " + ", ".join(f"{n} {x}" for n, x in about["shape"].items()))
    bench = random_bench(shape)
    about["sets"] = sets(bench)
    steps = {name: step for name, (_, step) in CONTESTANTS.items() if not peers.why_not(name)}
    entries = {
        name: {"name": name, "label": CONTESTANTS[name][0]} | counted(bench, name, step)
        for name, step in steps.items()
    }
    truth = {True: bench.run(partial(eager, truncated=True), Parts())}
    truth[False] = entries["eager"]["sums"]
    for name, entry in entries.items():
        entry["error"] = error(entry["sums"], truth[name == "ours-support"])
        log(f"{name}: error {entry['error']:.1e}, {entry['head_products']:.3g} products")
    in_alternation(bench, steps, entries, rounds, log)
    found = list(entries.values()) + peers.refused(CONTESTANTS)
    log(f"wrote {runner.write(folder, about, found)}")
    return found


def sets(bench: Bench) -> dict[str, float]:
    """What the sets are like: of all tokens, and of those that are trained on."""
    kept = bench.truncated.kept
    assert kept is not None
    size_T = kept.sizes.double()
    return {
        "mean": float(size_T.mean()),
        "singletons": float((size_T == 1).double().mean()),
        "p99": float(size_T.quantile(0.99)),
        "largest": float(size_T.max()),
        "selected_mean": float(size_T[selected(bench, truncated=True)].mean()),
    }


def selected(bench: Bench, truncated: bool) -> torch.Tensor:
    """The tokens that are trained on, bool [T]."""
    entropy_T = (bench.truncated if truncated else bench.rollouts).sampler_entropy_T
    rows = math.ceil(FRACTION * len(entropy_T))
    return at_least(entropy_T, entropy_T.sort(descending=True).values[rows - 1])


def counted(bench: Bench, name: str, step: Step) -> dict[str, Any]:
    """Loss and norm of the gradient of a step, and its products, the head's beside the formula's.

    Attention's products of queries, keys and values are none of torch.mm's, and not counted.
    """
    with Watch() as watch:
        parts = Parts(watch)
        sums = bench.run(step, parts)
    head, by_formula = sum(parts.counts.get(part, 0) for part in HEAD), formula(bench, name)
    return {
        "sums": sums,
        "products": {part: parts.counts.get(part, 0) for part in PARTS},
        "head_products": head,
        "formula_products": by_formula,
        "units": head / bench.unit,
        "formula_units": by_formula / bench.unit,
    }


def formula(bench: Bench, name: str) -> int:
    """Multiplications of the head, as docs/benchmarks.md counts them."""
    (vocabulary, hidden), scoring = bench.weight.shape, bench.unit
    # A scoring pass, and a step whose logits are kept, or multiplied again for backward.
    others = {"eager": 1 + 3, "trl": 1 + 4, "lce-known": 3}
    if name in others:
        return others[name] * scoring
    rows_T = selected(bench, truncated=name == "ours-support")
    if name == "ours-support":
        kept = bench.truncated.kept
        assert kept is not None
        size_R = kept.sizes[rows_T]
        return 3 * hidden * int(size_R[size_R > 1].sum())
    products = 0
    for rows in (int(rows_L.sum()) for rows_L in bench.rollouts.split(rows_T)):
        fits = 4 * rows * vocabulary <= STORED_LOGITS_BYTES["cpu"]
        stored = fits and 4 * hidden >= LEAST_ROW_BYTES["cpu"]
        products += (3 if stored else 4) * rows * hidden * vocabulary
    return products + (scoring if name == "ours" else 0)
