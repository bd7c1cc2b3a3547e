"""How long responses are taken to be, and what that costs."""

import pytest

from tests.trainer.test_plan import H200, RESPONSE, job_of
from trainer.plan.lengths import Lengths, steps_of
from trainer.plan.memory import step_memory
from trainer.plan.timing import sampling_seconds, slots


@pytest.mark.parametrize("mean", [0.5, 10, 300, 512, 800, 1023, 1024])
def test_lengths_have_the_mean_that_is_given(mean):
    lengths = Lengths(mean, 1024)
    found = lengths.of(1000)
    assert found == sorted(found)
    assert sum(found) / 1000 == pytest.approx(mean, rel=2e-3)
    assert 0 < found[0] <= found[-1] <= 1024
    assert lengths.second_moment >= mean**2 * (1 - 1e-6)


def test_second_moments_by_hand():
    """Uniform lengths of up to n: n^2 / 3; all alike: n^2; exponential ones of mean m: 2 m^2."""
    assert Lengths(512, 1024).second_moment == pytest.approx(1024**2 / 3, rel=1e-5)
    assert Lengths(1024, 1024).second_moment == 1024**2
    assert Lengths(10, 1024).second_moment == pytest.approx(2 * 10**2, rel=0.01)
    # A response that is being sampled has half of its length in the mean, if all are alike.
    assert Lengths(1024, 1024).held == 512
    assert Lengths(512, 1024).held == pytest.approx(1024 / 3, rel=1e-5)


def test_a_share_of_truncated_responses_is_at_the_limit():
    lengths = Lengths(400, 1000, truncated=0.2)
    found = lengths.of(1000)
    assert found.count(1000) == 200
    assert sum(found) / 1000 == pytest.approx(400, rel=2e-3)
    with pytest.raises(ValueError, match=r"a share of 0.5 at 1000 tokens does not go with a mean"):
        Lengths(400, 1000, truncated=0.5)
    for mean in (0, -1, 1001):
        with pytest.raises(ValueError, match=r"the mean length must lie in \(0, 1000\]"):
            Lengths(mean, 1000)


def test_steps_until_the_last_is_sampled():
    assert steps_of([5.0], 8) == 5
    assert steps_of([3.0, 1.0, 2.0], 1) == 6
    assert steps_of([4.0] * 6, 3) == 8
    # In a long queue: all tokens by the places, and the tail.
    lengths = Lengths(300, 1000).of(5000)
    steps = steps_of(lengths, 50)
    assert 5000 * 300 / 50 < steps < 5000 * 300 / 50 + 1000


def test_decoding_by_the_lengths_that_are_given():
    """All at the limit take what the longest takes; shorter ones less, but no less than it."""
    small = {"rollout.batch_size": 8, "rollout.prompts": 1, "rollout.group_size": 8}
    small |= {"algorithm.min_groups": 1, "optimizer.mini_batches": 1}
    limit = 20_480

    def decode(lengths):
        job = job_of("qwen3-14b", changes=small, given_lengths=lengths)
        return sampling_seconds(job, step_memory(job), 1, 8)[1]

    rate = 0.6 * 4.8e12
    weights, cache = 2 * 14_768_307_200, 163_840
    full = decode(Lengths(limit, limit))
    assert full == pytest.approx(
        (limit * weights + 8 * limit * (150 + limit / 2) * cache) / rate, rel=1e-6
    )
    short = Lengths(0.37 * limit, limit, truncated=1 / 8)
    pairs = 150 * short.mean + short.second_moment / 2
    assert decode(short) == pytest.approx((limit * weights + 8 * pairs * cache) / rate)
    tail = short.of(8)[-2]
    assert decode(Lengths(1000, limit)) < tail * weights / rate < decode(short) < full


def test_a_place_in_the_cache_holds_what_there_is_of_a_response():
    job = job_of("qwen3-14b", 8)
    room = 0.8 * H200 - 2 * 14_768_307_200
    held = 150 + Lengths(RESPONSE, 20_480).held
    assert slots(job, step_memory(job)) == int(room / (held * 163_840)) == 93
    alike = job_of("qwen3-14b", 8, given_lengths=Lengths(8000, 8000))
    assert slots(alike, step_memory(alike)) == int(room / ((150 + 4000) * 163_840))
