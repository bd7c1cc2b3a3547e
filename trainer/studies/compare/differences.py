"""Which differences between arms are larger than the spread over seeds.

A seed is a whole replication that all arms share, so arms are compared within seeds.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtr

from trainer.evaluation.estimates import CONFIDENCE, t_quantile


class Interval(NamedTuple):
    """A mean over seeds and Student's interval around it."""

    mean: float
    low: float
    high: float
    seeds: int


class Difference(NamedTuple):
    """Arm less other arm, over the seeds that both have."""

    arm: str
    other: str
    interval: Interval
    p: float
    """The p-value of the paired t-test."""
    p_holm: float
    """The same, adjusted by Holm for all differences that are asked for."""
    p_flips: float
    """The p-value over all flips of the differences' signs; with n seeds at least 2 / 2^n."""

    @property
    def distinguishable(self) -> bool:
        """Whether the adjusted p is below 0.05."""
        return self.p_holm < 1 - CONFIDENCE


def interval(values: Sequence[float], least: float = 0.0) -> Interval:
    """Mean of `values` and its 95% interval by Student's t; infinite for a single value, and not
    a number where a value is none. Their standard deviation counts as `least` or more.

    Raises ValueError for none.
    """
    if not values:
        raise ValueError("an interval needs one value or more; got none")
    mean, count = fmean(values), len(values)
    if not math.isfinite(mean):
        return Interval(math.nan, math.nan, math.nan, count)
    if count < 2:
        return Interval(mean, -math.inf, math.inf, count)
    spread = max(stdev(values), least)
    half = t_quantile(count - 1) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def differences(
    values: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    resolution: float = 0.0,
) -> list[Difference]:
    """The difference of each of `pairs`, (arm, other); `values` has each arm's value by seed.

    A value is known to multiples of `resolution`, 1/n for an accuracy on n problems. The standard
    deviation over seeds is taken as at least that of two roundings, `resolution` / sqrt(6). Seeds
    that agree to the last digit of few problems would else tell any difference. Raises ValueError
    where a pair has fewer than two seeds in common.
    """
    found = []
    for arm, other in pairs:
        seeds = sorted(values[arm].keys() & values[other].keys())
        if len(seeds) < 2:
            raise ValueError(
                f"{arm} and {other} have {len(seeds)} seeds in common; 2 or more are wanted"
            )
        apart = [values[arm][seed] - values[other][seed] for seed in seeds]
        least = resolution / math.sqrt(6)
        found.append(
            (arm, other, interval(apart, least), _t_test(apart, least), _sign_flips(apart))
        )
    adjusted = holm([p for *_, p, _ in found])
    return [
        Difference(arm, other, around, p, p_holm, flips)
        for (arm, other, around, p, flips), p_holm in zip(found, adjusted, strict=True)
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method, in their order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def _t_test(apart: Sequence[float], least: float) -> float:
    """Two-sided p of a mean of zero, the standard deviation counting as `least` or more."""
    spread = max(stdev(apart), least) / math.sqrt(len(apart))
    if spread == 0:
        return 0.0 if apart[0] else 1.0
    return 2 * float(stdtr(len(apart) - 1, -abs(fmean(apart)) / spread))


def _sign_flips(apart: Sequence[float]) -> float:
    """Two-sided p of a distribution that is symmetric about zero, by all flips of signs."""
    observed = abs(sum(apart)) * (1 - 1e-12)
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, apart, strict=True)))
        for signs in product((1, -1), repeat=len(apart))
    ]
    return sum(total >= observed for total in flips) / len(flips)
