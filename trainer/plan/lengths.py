"""The lengths of responses, which decide how long a step takes and what its cache holds."""

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# The second moment is the mean square over the midpoints of this many equal shares.
_SHARES = 1000
_SATURATED, _STEEPEST = 500.0, 1e6


@dataclass(frozen=True)
class Lengths:
    """Lengths in (0, limit] with a given mean, in tokens.

    `truncated` is the share that reaches the limit. The others are spread as an exponential that is
    cut off at the limit: of all distributions with that mean it assumes the least.
    """

    mean: float
    limit: int
    truncated: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.mean <= self.limit:
            raise ValueError(
                f"the mean length must lie in (0, {self.limit}], the limit of a response; got "
                f"{self.mean:g}"
            )
        if not 0 <= self.truncated <= 1 or self.truncated * self.limit > self.mean:
            raise ValueError(
                f"a share of {self.truncated:g} at {self.limit} tokens does not go with a mean of "
                f"{self.mean:g}"
            )

    def of(self, count: int) -> list[float]:
        """`count` lengths, ascending: the middle of each of so many equal shares."""
        return [self._at((i + 0.5) / count) for i in range(count)]

    @cached_property
    def second_moment(self) -> float:
        """The mean of the squares."""
        return sum(length * length for length in self.of(_SHARES)) / _SHARES

    @property
    def held(self) -> float:
        """Tokens that a response being sampled has on average: a longer one is there for longer."""
        return self.second_moment / (2 * self.mean)

    def _at(self, share: float) -> float:
        """The length that `share` of all are shorter than."""
        free = 1 - self.truncated
        if share >= free or self.mean == self.limit:
            return float(self.limit)
        rate = _rate((self.mean - self.truncated * self.limit) / free / self.limit)
        share /= free
        if abs(rate) < 1e-6:
            return share * self.limit
        if rate < -_SATURATED:
            return max(1 - math.log(share) / rate, 0.0) * self.limit
        return -math.log1p(share * math.expm1(-rate)) / rate * self.limit


def steps_of(lengths: Sequence[float], slots: int) -> float:
    """Steps until the last of `lengths` is sampled, `slots` at a time, in an order without meaning.

    A place that becomes free is filled at once.
    """
    order = list(lengths)
    random.Random(0).shuffle(order)
    ends = [0.0] * min(slots, len(order))
    for length in order:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _rate(mean: float) -> float:
    """The rate of the exponential on (0, 1) with `mean`: 1 / rate - 1 / (e^rate - 1) = mean."""
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(100):
        rate = (low + high) / 2
        low, high = (rate, high) if _mean(rate) > mean else (low, rate)
    return rate


def _mean(rate: float) -> float:
    if abs(rate) < 1e-4:
        return 0.5 - rate / 12
    if abs(rate) > _SATURATED:  # e^|rate| would overflow
        return 1 / rate + (rate < 0)
    return 1 / rate - 1 / math.expm1(rate)
