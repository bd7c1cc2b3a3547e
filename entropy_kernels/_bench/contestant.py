"""What takes part in a benchmark, and the check that comes before its timing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The largest error relative to the truth's norm: where all is fp32; where results alone are rounded
# to 16 bits; and where logits are, whose spacing in bf16 is 1/4 at the size of a peaked row's.
FP32, ROUNDED_ONCE, ROUNDED_LOGITS = 1e-3, 1e-2, 0.25
# What a step computes from hidden states and weight. Those that are told the selection compute the
# rest, some without entropies; those that have it beforehand need log-probs of the selected alone.
EVERYTHING = ("log-probs", "entropies", "selection", "loss", "gradients")
TOLD = ("log-probs", "entropies", "loss", "gradients")
NO_ENTROPIES = ("log-probs", "loss", "gradients")
# Elements that are compared at a time.
_CHUNK = 1 << 24

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
    counted: Callable[[Any], Results] | None = None
    """Where `run` hides products in one operation: what has as many, and is counted."""
    needs: tuple[str, ...] = ()
    """Modules without which it is listed and not run."""
    computes: tuple[str, ...] = ()
    """What of `EVERYTHING` it computes in the step; a selection that it is told is none."""


class RefusedError(Exception):
    """What a contestant raises that cannot compute the problem, with the reason."""


class WrongResultError(RefusedError):
    """Results too far from the truth for their speed to mean anything."""


def check(
    results: Results, truth: Mapping[str, Tensor], dtype: torch.dtype, *, exact: bool
) -> dict[str, float]:
    """The error of each result, relative to the truth's norm, or WrongResultError."""
    allowed = ROUNDED_ONCE if exact else ROUNDED_LOGITS
    allowed = FP32 if dtype == torch.float32 else allowed
    errors = {}
    for name, got in results.items():
        errors[name] = relative_error(got, truth[name])
        if not errors[name] <= allowed:
            raise WrongResultError(f"{name} is off by {errors[name]:.2g}; {allowed} is allowed")
    return errors


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in fp64, |got| where the truth is all zeros; NaN stays."""
    if wanted.ndim == 0:
        # A loss is a sum of terms of both signs and of size 1: its own size is no scale.
        return float((got.double() - wanted.double()).abs())
    error = norm = torch.zeros((), dtype=torch.float64, device=wanted.device)
    for x, y in zip(got.flatten().split(_CHUNK), wanted.flatten().split(_CHUNK), strict=True):
        error = error + (x.double() - y.double()).square().sum()
        norm = norm + y.double().square().sum()
    return float((error / (norm if norm > 0 else 1.0)).sqrt())
