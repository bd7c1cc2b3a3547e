"""The clipped loss on per-token log-probabilities, its gradient and its metrics.

A trainer writes it as a dozen operations, and the metrics that it logs as a dozen more; ours finds
all of them in one pass. No contestant has logits to compute here.

B sequences, L their length.
"""

import functools
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import runner
from benchmarks.runner import Contestant
from entropy_kernels import backends

# The process that measures memory imports this module.
MODULE = "benchmarks.bench_ratio_loss"
LOW, HIGH = 0.2, 0.28
FRACTION = 0.2
# (B, L): a micro-batch, a step, a large step; with rounds.
SHAPES = {(8, 512): 101, (64, 2048): 51, (512, 8192): 11}
QUICK = (4, 16), 2

Found = tuple[Tensor, dict[str, Tensor]]


class Problem(NamedTuple):
    """One step's inputs, [B, L]; one advantage per sequence; `selected` is a subset of `mask`."""

    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor  # [B]
    mask: Tensor
    selected: Tensor


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-L{}".format(*shape))
def bench_ratio_loss(shape, start, record):
    record(functools.partial(measure, *start(SHAPES, shape, QUICK)))


def measure(shape, rounds, folder, log=print):
    """The result file's entries."""
    return runner.measure(
        "ratio_loss",
        {"sequences": shape[0], "length": shape[1]},
        contestants(),
        make_problem(*shape),
        truth,
        rounds=rounds,
        folder=folder,
        log=log,
        watched=None if shape in SHAPES else 1,
        module=MODULE,
    )


def make_problem(sequences: int, length: int) -> Problem:
    """Responses of all lengths; ratios of which some are clipped; a fifth of the tokens."""
    generator = torch.Generator().manual_seed(0)
    uniform_BL = torch.rand(sequences, length, generator=generator)
    old_BL = uniform_BL.log().clamp_min(-20)
    noise_BL = 0.15 * torch.randn(sequences, length, generator=generator)
    lengths_B1 = torch.randint(1, length + 1, (sequences, 1), generator=generator)
    mask_BL = torch.arange(length) < lengths_B1
    return Problem(
        (old_BL + noise_BL).clamp_max(0).requires_grad_(),
        old_BL,
        torch.randn(sequences, generator=generator),
        mask_BL,
        ek.top_entropy_mask(-old_BL, mask_BL, fraction=FRACTION),
    )


def small_problem(like: Problem) -> Problem:
    """A small problem, whose run loads libraries and starts threads."""
    return make_problem(2, 8)


def truth(problem: Problem) -> dict[str, Tensor]:
    """The formula in fp64."""
    double = Problem(*(x.double() if x.is_floating_point() else x for x in problem))
    leaf = double.logprob.detach().requires_grad_()
    loss, metrics = _formula(double._replace(logprob=leaf))
    return _step(leaf, loss, metrics)


def contestants() -> list[Contestant]:
    """The first is what the others are compared with."""
    eager, alone = _eager(_formula), _eager(_loss_alone)
    found = [
        Contestant("eager", "eager: the formula and its metrics", eager),
        Contestant("eager-alone", "eager: the formula alone, no metrics", alone),
        Contestant("compile", "torch.compile of both", _compiled, uncompiled=eager),
    ]
    for impl in backends.available():
        label = f"ours ({impl}): both in one pass"
        found.append(Contestant(impl, label, functools.partial(_ours, impl=impl)))
    return found


def _loss_alone(problem: Problem) -> Found:
    """arXiv 2506.01939v2, equation 6, as TRL writes it: a mask on the losses of all tokens."""
    ratio_BL = (problem.logprob - problem.old_logprob).exp()
    clipped_BL = ratio_BL.clamp(1 - LOW, 1 + HIGH)
    advantage_B1 = problem.advantage.unsqueeze(1)
    loss_BL = -torch.min(ratio_BL * advantage_B1, clipped_BL * advantage_B1)
    keep_BL = problem.mask & problem.selected
    return (loss_BL * keep_BL).sum() / keep_BL.sum().clamp_min(1), {}


def _formula(problem: Problem) -> Found:
    """The loss, and the metrics that ours returns with it."""
    loss, _ = _loss_alone(problem)
    with torch.no_grad():
        log_ratio_BL = problem.logprob - problem.old_logprob
        ratio_BL = log_ratio_BL.exp()
        keep_BL = problem.mask & problem.selected
        count = keep_BL.sum().clamp_min(1)
        advantage_B1 = problem.advantage.unsqueeze(1)
        low_BL = (ratio_BL < 1 - LOW) & (advantage_B1 < 0)
        high_BL = (ratio_BL > 1 + HIGH) & (advantage_B1 > 0)
        means = {
            "clip/low": low_BL.to(ratio_BL.dtype),
            "clip/high": high_BL.to(ratio_BL.dtype),
            "ratio/mean": ratio_BL,
            "kl/k1": -log_ratio_BL,
            "kl/k3": ratio_BL - 1 - log_ratio_BL,
        }
        metrics = {name: (x * keep_BL).sum() / count for name, x in means.items()}
        metrics["ratio/max"] = (ratio_BL * keep_BL).max()
    return loss, metrics


def _eager(objective: Callable[[Problem], Found]) -> Callable[[Problem], dict[str, Tensor]]:
    return lambda problem: _step(problem.logprob, *objective(problem))


def _compiled(problem: Problem) -> dict[str, Tensor]:
    return _step(problem.logprob, *_compiler()(problem))


@cache
def _compiler() -> Callable[[Problem], Found]:
    return torch.compile(_formula)


def _ours(problem: Problem, *, impl: str) -> dict[str, Tensor]:
    loss, metrics = ek.ratio_loss(*problem[:4], selected=problem.selected, impl=impl)
    names = "clip/low", "clip/high", "ratio/mean", "kl/k1", "kl/k3", "ratio/max"
    return _step(problem.logprob, loss, {name: metrics[name] for name in names})


def _step(logprob: Tensor, loss: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    (dlogprob_BL,) = torch.autograd.grad(loss, logprob)
    return {"loss": loss.detach(), "dlogprob": dlogprob_BL, **metrics}
