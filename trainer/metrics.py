"""Metrics of a step: parts joined into the whole, seconds, and the mismatch between the engine
that sampled and the policy that trains.

T response tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from trainer.config import Config, sources
from trainer.config.sources import in_bf16

# Prefixes of metrics that are added up, not averaged, when parts of a step are joined, and endings
# of those whose largest value is taken.
SUMS = ("head/", "skipped/", "sum/", "tokens/")
MAXIMA = ("/max", "/max_ratio")


@dataclass
class Meter:
    """Metrics of parts joined into those of the whole: counts and sums (SUMS) add up, maxima stay
    maxima, all others are means, weighted."""

    totals: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, Any], weight: float) -> None:
        """Add the metrics of one part."""
        for name, value in metrics.items():
            before = self.totals.get(name, 0.0)
            if name.endswith(MAXIMA):
                self.totals[name] = max(before, float(value))
            elif name.startswith(SUMS):
                self.totals[name] = before + float(value)
            else:
                self.totals[name] = before + weight * float(value)
                self.weights[name] = self.weights.get(name, 0.0) + weight

    @staticmethod
    def of(parts: "Sequence[Meter]") -> "Meter":
        """The meter of all `parts` together."""
        total = Meter()
        for part in parts:
            for name, value in part.totals.items():
                before = total.totals.get(name, 0.0)
                joined = max(before, value) if name.endswith(MAXIMA) else before + value
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
    """Seconds on `device`, in pieces; a GPU notes the times, and is waited for at the end."""

    device: torch.device
    _times: list[Any] = field(default_factory=list)

    def start(self) -> None:
        """Begin a piece."""
        self._times.append(self._now())

    def stop(self) -> None:
        """End it."""
        self._times.append(self._now())

    @property
    def seconds(self) -> float:
        """The seconds of all pieces that have ended."""
        pairs = list(zip(self._times[::2], self._times[1::2], strict=False))
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in pairs)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def numbers(parts: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The metrics of several parts as numbers; a GPU is waited for once."""
    tensors = [
        x.detach().double() for part in parts for x in part.values() if isinstance(x, Tensor)
    ]
    values = iter(torch.stack(tensors).tolist() if tensors else ())
    return [
        {name: next(values) if isinstance(x, Tensor) else float(x) for name, x in part.items()}
        for part in parts
    ]


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def correction(settings: Config, sampler_logprob: Tensor | None = None) -> ek.Correction:
    """The correction of the policy's ratio to the sampler in the loss; type None if none is wanted.

    "auto" is none in fp32, where both give the same log-probs up to rounding, and "tis" in bf16.
    The ratio is the old policy's. Where the old log-probs are the sampler's, it is the current
    policy's, which the loss has already, and is measured with any type.
    """
    algorithm, name = settings.algorithm, settings.algorithm.correction
    of = "current" if sources(settings).old_logprob == "sampler" else "old"
    if name == "auto":
        name = "tis" if in_bf16(settings) else "none"
    if name == "none":
        return ek.Correction(sampler_logprob=sampler_logprob if of == "current" else None, of=of)
    bounds = algorithm.correction_cap, algorithm.correction_floor
    return ek.Correction(name, *bounds, sampler_logprob, of)


def mismatch_in_loss(metrics: dict[str, float], settings: Config, moved: bool) -> dict[str, float]:
    """Metrics of an update, the mismatch of its loss by the names of `mismatch_metrics`.

    The loss has it where its old log-probs are the sampler's. It is that of the policy that sampled
    until the weights have `moved`, and is left out after that.
    """
    measured = not moved and sources(settings).old_logprob == "sampler"
    names = {"mismatch/k3": "mismatch/kl", "mismatch/outside": "mismatch/corrected"}
    return {
        names.get(name, name): value
        for name, value in metrics.items()
        if measured or not name.startswith("mismatch/")
    }


def mismatch_metrics(
    old_logprob_T: Tensor, sampler_logprob_T: Tensor, settings: Config
) -> dict[str, float]:
    """The mismatch over the response tokens, with r = pi_old / pi_sampler per token.

    mismatch/kl is the mean of r - 1 - log r, an estimate of KL(sampler || old) that is never
    negative (k3, http://joschu.net/blog/kl-approx.html). mismatch/difference is the mean of
    |log r|, and mismatch/corrected the share of tokens whose r the correction changes.
    """
    log_ratio = (old_logprob_T - sampler_logprob_T).double()
    ratio = log_ratio.exp()
    metrics = {
        "mismatch/kl": float((log_ratio.expm1() - log_ratio).mean()),
        "mismatch/max_ratio": float(ratio.max()),
        "mismatch/difference": float(log_ratio.abs().mean()),
    }
    if correction(settings).type is not None:
        low, high = settings.algorithm.correction_floor, settings.algorithm.correction_cap
        metrics["mismatch/corrected"] = float(((ratio < low) | (ratio > high)).double().mean())
    return metrics
