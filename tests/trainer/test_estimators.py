"""Means over problems and their intervals: by enumeration, by known values, and by simulation."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.estimates import (
    Estimate,
    _wilson,
    average,
    estimate,
    majority,
    pass_at_k,
    powers_up_to,
    standard_error,
    t_quantile,
    wilson,
)

SAMPLES = 16


def of(p):
    """Beta-distributed chances of 30 problems, by their two parameters."""
    return np.random.default_rng(7).beta(*p, (2000, 30))


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        responses = [True] * right + [False] * (samples - right)
        drawn = [any(some) for some in itertools.combinations(responses, k)]
        assert pass_at_k(right, samples, k) == pytest.approx(statistics.fmean(drawn), abs=1e-15)


def test_pass_at_k_is_exact_where_factorials_overflow():
    assert pass_at_k(1, 10**5, 1000) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(("right", "k"), [(3, 1), (-1, 1), (1, 0), (1, 3)])
def test_pass_at_k_refuses_what_cannot_be(right, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {right} right in 2"):
        pass_at_k(right, 2, k)


def test_k_doubles_up_to_the_samples():
    assert [powers_up_to(n) for n in (1, 2, 3, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 10]]
    assert powers_up_to(16) == [1, 2, 4, 8, 16]


def test_one_response_a_problem_has_the_interval_of_wilson():
    """Against its defining equation: its ends are the p0 at which the score test turns."""
    for right, n in ((0, 30), (3, 30), (15, 30), (30, 30), (200, 674)):
        found = estimate([1.0] * right + [0.0] * (n - right), 1)
        for end in found[1:]:
            if 0 < end < 1:
                score = (found.value - end) / math.sqrt(end * (1 - end) / n)
                assert abs(score) == pytest.approx(1.959963985, rel=1e-9)
        assert found.low < found.value or right == 0
        assert found.value < found.high or right == n


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (30, 2.042272), (10**6, 1.959966)],
)
def test_students_t_is_that_of_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-6)


def test_wilson_by_hand():
    """By hand: z^2 / (n + z^2) and 1 / (1 + z^2) at the ends, for z^2 = 3.841459."""
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.0, 0.277533), abs=1e-6)
    assert wilson(0.25, 40) == pytest.approx((0.25, 0.141871, 0.401939), abs=1e-6)
    assert wilson(1.0, 1) == pytest.approx((1.0, 0.206549, 1.0), abs=1e-6)
    for share, trials in ((0.5, 0), (1.5, 3), (-0.1, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match=r"wanted a share in \[0, 1\] of one trial"):
            wilson(share, trials)


def test_none_and_all_right_have_an_interval():
    """30 problems without one right response leave room for 12%, and 500 for 1%."""
    none, every = estimate([0.0] * 30, SAMPLES), estimate([1.0] * 30, SAMPLES)
    assert none == Estimate(0.0, 0.0, pytest.approx(0.122, abs=5e-4))
    assert every == Estimate(1.0, pytest.approx(0.878, abs=5e-4), 1.0)
    assert estimate([0.0] * 500, SAMPLES).high == pytest.approx(0.0077, abs=1e-4)
    assert estimate([1.0], SAMPLES).low < 0.01


def test_a_single_right_response_does_not_narrow_it_much():
    none = estimate([0.0] * 30, SAMPLES)
    one = estimate([1 / SAMPLES] + [0.0] * 29, SAMPLES)
    assert none.high * 0.9 < one.high < none.high * 1.1


@given(st.lists(st.integers(0, SAMPLES), min_size=1, max_size=60))
def test_an_interval_holds_its_mean_and_lies_within_0_and_1(right):
    found = estimate([count / SAMPLES for count in right], SAMPLES)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    mirrored = estimate([1 - count / SAMPLES for count in right], SAMPLES)
    assert 1 - mirrored.high == pytest.approx(found.low, abs=1e-12)


@pytest.mark.parametrize(
    "shape", [(0.02, 0.6), (0.1, 0.9), (0.3, 0.3), (2, 2), (20, 20), (5, 0.05)], ids=str
)
def test_it_covers_the_truth_of_30_problems(shape):
    """95% of the intervals hold the mean over all problems like these."""
    chance, truth = of(shape), shape[0] / sum(shape)
    drawn = np.random.default_rng(8).binomial(SAMPLES, chance) / SAMPLES
    found = [estimate(values.tolist(), SAMPLES) for values in drawn]
    assert statistics.fmean(one.low <= truth <= one.high for one in found) > 0.94


def test_the_bootstrap_does_not_where_few_are_right():
    """Why it is not used: it holds the truth in 75% of the cases that the one above covers."""
    drawn = np.random.default_rng(8).binomial(SAMPLES, of((0.02, 0.6))[:200]) / SAMPLES
    index = np.random.default_rng(9).integers(0, 30, (400, 30))
    low, high = np.quantile(drawn[:, index].mean(2), [0.025, 0.975], axis=1)
    assert ((low <= 0.02 / 0.62) & (high >= 0.02 / 0.62)).mean() < 0.8


def test_samples_narrow_it_only_where_problems_are_alike():
    alike = [8 / 16] * 30
    apart = [1.0, 0.0] * 15
    assert estimate(alike, 16).high < estimate(alike, 1).high
    # As many trials as problems; Student's t in the place of 1.96 alone sets them apart.
    same = _wilson(0.5, 30, t_quantile(30))
    assert estimate(apart, 16) == pytest.approx(same, abs=1e-12)
    assert estimate(apart, 16).high > estimate(apart, 1).high


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="needs one problem at least"):
        estimate([], 1)


def test_an_average_recovers_the_variances_of_its_parts():
    assert average([Estimate(0.4, 0.3, 0.6)]) == pytest.approx((0.4, 0.3, 0.6))
    # Errors of 3 and 4 on two sets are one of 5 on their sum.
    both = average([Estimate(0.2, 0.17, 0.23), Estimate(0.6, 0.56, 0.64)])
    assert both == pytest.approx((0.4, 0.375, 0.425))
    sure = average([estimate([0.0] * 30, 16), estimate([1.0] * 30, 16)])
    assert sure.low == pytest.approx(0.5 - 0.061, abs=1e-3)
    assert sure.high == pytest.approx(0.5 + 0.061, abs=1e-3)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["7", "8", "7"], [1.0, 0.0, 1.0], 1.0),
        (["7", "8", "8"], [1.0, 0.0, 0.0], 0.0),
        (["7", "8"], [1.0, 0.0], 0.5),
        (["7", "8", "9"], [1.0, 0.0, 0.0], 1 / 3),
        (["7", "7", "8"], [1.0, 0.0, 0.0], 0.5),
        (["7"], [1.0], 1.0),
    ],
)
def test_the_majority_decides_and_ties_share(answers, rewards, expected):
    assert majority(answers, rewards) == pytest.approx(expected)


def test_the_standard_error_is_over_problems():
    values = [0.0, 0.25, 1.0, 0.5]
    assert standard_error(values) == pytest.approx(statistics.stdev(values) / 2)
    assert standard_error([0.5]) == standard_error([1.0, 1.0]) == 0.0
