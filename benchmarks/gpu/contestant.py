"""What takes part: a name, the step it computes, and the check that comes before its timing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.problem import Problem

Results = dict[str, Tensor]

# The largest error relative to the truth's norm: where all is fp32; where results alone are rounded
# to 16 bits; and where logits are, whose spacing in bf16 is 1/4 at the size of a peaked row's.
FP32, ROUNDED_ONCE, ROUNDED_LOGITS = 1e-3, 1e-2, 0.25
CHUNK = 1 << 26


class WrongResultError(Exception):
    """Results too far from the truth for their speed to mean anything."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a step, or its forward."""

    name: str
    label: str
    run: Callable[[Problem], Results]
    """Named results, some of those that the truth has."""
    units: float
    """Products of T x D x V it takes."""
    exact: bool = False
    """Whether logits are fp32 when inputs have 16 bits."""


def step(problem: Problem, loss: Tensor) -> Results:
    """The loss and its gradients."""
    dhidden_TD, dweight_VD = torch.autograd.grad(loss, [problem.hidden, problem.weight])
    return {"loss": loss.detach(), "dhidden": dhidden_TD, "dweight": dweight_VD}


def check(contestant: Contestant, problem: Problem) -> float:
    """The largest error of any result, relative to the truth's norm, or WrongResultError."""
    allowed = ROUNDED_ONCE if contestant.exact else ROUNDED_LOGITS
    allowed = FP32 if problem.hidden.dtype == torch.float32 else allowed
    worst = 0.0
    for name, got in contestant.run(problem).items():
        error = relative_error(got, problem.truth[name])
        if not error <= allowed:
            raise WrongResultError(f"{name} is off by {error:.2g}; {allowed} is allowed")
        worst = max(worst, error)
    return worst


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in fp64, a chunk at a time; NaN stays."""
    if wanted.ndim == 0:
        # A loss is a sum of terms of both signs and of size 1: its own size is no scale.
        return float((got.double() - wanted.double()).abs())
    error = norm = torch.zeros((), dtype=torch.float64, device=wanted.device)
    for x, y in zip(got.flatten().split(CHUNK), wanted.flatten().split(CHUNK), strict=True):
        error = error + (x.double() - y.double()).square().sum()
        norm = norm + y.double().square().sum()
    return float((error / norm).sqrt())
