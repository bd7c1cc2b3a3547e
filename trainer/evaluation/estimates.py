"""What an evaluation says of a model: means over problems, with 95% confidence intervals.

The problems are the sample: an interval tells where the mean over problems like these would lie,
not over more responses to the same ones.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95


def t_quantile(degrees: int) -> float:
    """The half width of a 95% interval in standard errors, by Student's t of so many degrees."""
    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


class Estimate(NamedTuple):
    """A mean and the ends of its 95% confidence interval, all in [0, 1]."""

    value: float
    low: float
    high: float


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Chance that one of `k` responses is right, where `right` of `samples` were; unbiased.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374), equation 1, in exact integers.
    Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {right} right in {samples}: wanted 1 <= k <= samples >= right"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, and `samples`: the k of pass@k."""
    return [2**i for i in range((samples - 1).bit_length())] + [samples]


def majority(answers: Sequence[str], rewards: Sequence[float]) -> float:
    """Reward of the most frequent of `answers`, the mean over those that tie for it.

    Where equal answers were judged differently, the mean of their rewards stands for them.
    """
    votes = Counter(answers)
    most = max(votes.values())
    return fmean(
        fmean(reward for answer, reward in zip(answers, rewards, strict=True) if answer == winner)
        for winner, count in votes.items()
        if count == most
    )


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent `values`; 0 if they are equal or one."""
    return math.sqrt(_squares(values) / max(len(values) - 1, 1) / len(values))


def wilson(share: float, trials: int) -> Estimate:
    """Wilson's score interval for `share` of so many independent `trials`, such as 0.25 of 40.

    Wilson 1927; recommended for small numbers by Brown, Cai and DasGupta 2001. It is for one
    response to each problem, a greedy one for instance: with 30 problems, all wrong, it ends at
    0.11. Raises ValueError for no trials and for a share outside [0, 1].
    """
    if trials < 1 or not 0 <= share <= 1:
        raise ValueError(f"wanted a share in [0, 1] of one trial or more; got {share} of {trials}")
    return _wilson(share, trials, float(ndtri(0.5 + CONFIDENCE / 2)))


def estimate(values: Sequence[float], samples: int) -> Estimate:
    """The mean of one value in [0, 1] for each problem, each from `samples` responses.

    With one response to each it is `wilson`. Several responses to one problem are not independent,
    so n responses are worth fewer. The effective number m = p (1 - p) / Var(mean) takes the place
    of n in Wilson's interval. Student's t with a degree of freedom for each problem takes the place
    of 1.96 (Korn and Graubard 1998; compared by Dean and Pagano 2015). So m is the number of
    problems where responses to one problem agree, and that of all responses where they are
    independent. Var counts one problem more than there are, half of it right and half of it wrong.
    Without it a mean of 0 or 1 would have no variance, and one right response in hundreds nearly
    none. The interval lies in [0, 1] and is never empty: with 30 problems, all wrong, it ends at
    0.12. The bootstrap's is a point there, and too short near by.

    Raises ValueError for no values, and for one outside [0, 1], such as a verdict of 2.
    """
    problems = len(values)
    if not problems:
        raise ValueError("an estimate needs one problem at least; got none")
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"an estimate needs shares in [0, 1]; got {min(values):g} to {max(values):g}"
        )
    mean = fmean(values)
    if samples == 1:
        return wilson(mean, problems)
    wide = (mean * problems + 0.5) / (problems + 1)
    squares = _squares(values, wide) + (wide**2 + (1 - wide) ** 2) / 2
    effective = wide * (1 - wide) * problems * (problems + 1) / squares
    return _wilson(mean, min(effective, problems * samples), t_quantile(problems))


def average(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates.

    Its interval recovers their variances from their ends (MOVER: Zou and Donner 2008), so it is
    right where a part is 0 or 1.
    """
    value = fmean(part.value for part in parts)
    below = math.hypot(*(part.value - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.value for part in parts)) / len(parts)
    return Estimate(value, value - below, value + above)


def _squares(values: Sequence[float], center: float | None = None) -> float:
    middle = fmean(values) if center is None else center
    return math.fsum((value - middle) ** 2 for value in values)


def _wilson(p: float, n: float, t: float) -> Estimate:
    """Wilson's score interval for `p` seen in `n` independent trials."""
    scale = 1 + t**2 / n
    center = (p + t**2 / (2 * n)) / scale
    half = t / scale * math.sqrt(p * (1 - p) / n + (t / (2 * n)) ** 2)
    # Rounding aside, the interval holds p, and starts at 0 where p is 0.
    return Estimate(
        p, max(min(center - half, p), 0.0) if p else 0.0, min(max(center + half, p), 1.0)
    )
