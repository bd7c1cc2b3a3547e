"""A contestant: its name, the step that it computes, and the check before its timing."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gpu.problem import Problem
from entropy_kernels._bench import contestant as shared
from entropy_kernels._bench import step as steps
from entropy_kernels._bench.contestant import (
    FP32,
    ROUNDED_ONCE,
    Results,
    WrongResultError,
    relative_error,
)

__all__ = ["FP32", "ROUNDED_ONCE", "Results", "WrongResultError", "relative_error"]


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
    return steps.step(problem.hidden, problem.weight, loss)


def check(contestant: Contestant, problem: Problem) -> float:
    """The largest error of any result, relative to the truth's norm, or WrongResultError."""
    dtype, exact = problem.hidden.dtype, contestant.exact
    return max(shared.check(contestant.run(problem), problem.truth, dtype, exact=exact).values())
