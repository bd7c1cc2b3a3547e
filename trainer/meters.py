"""Metrics of parts joined into those of the whole, and seconds on a device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# What is added up, not averaged, where parts of a step are joined.
SUMS = ("head/", "skipped/", "sum/", "tokens/")


@dataclass
class Meter:
    """Metrics of parts joined into those of the whole: counts and sums (SUMS) add up, maxima stay
    maxima, all others are means, weighted."""

    totals: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, Any], weight: float) -> None:
        """The metrics of one part."""
        for name, value in metrics.items():
            before = self.totals.get(name, 0.0)
            if name.endswith("/max"):
                self.totals[name] = max(before, float(value))
            elif name.startswith(SUMS):
                self.totals[name] = before + float(value)
            else:
                self.totals[name] = before + weight * float(value)
                self.weights[name] = self.weights.get(name, 0.0) + weight

    @staticmethod
    def of(parts: "Sequence[Meter]") -> "Meter":
        """What all `parts` have seen."""
        total = Meter()
        for part in parts:
            for name, value in part.totals.items():
                before = total.totals.get(name, 0.0)
                joined = max(before, value) if name.endswith("/max") else before + value
                total.totals[name] = joined
            for name, weight in part.weights.items():
                total.weights[name] = total.weights.get(name, 0.0) + weight
        return total

    def result(self) -> dict[str, float]:
        """The metrics of the whole."""
        return {
            name: total / max(self.weights[name], 1e-9) if name in self.weights else total
            for name, total in self.totals.items()
        }


@dataclass
class Stopwatch:
    """Seconds on `device`, in pieces."""

    device: torch.device
    seconds: float = 0.0
    _began: float = 0.0

    def start(self) -> None:
        """Begin a piece."""
        self._began = clock(self.device)

    def stop(self) -> None:
        """End it."""
        self.seconds += clock(self.device) - self._began


def clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
