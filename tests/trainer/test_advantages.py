"""Group advantages and the overlong punishment, against their formulas one at a time."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.advantages import group_advantages, overlong_punishment
from trainer.config import Algorithm

REWARDS = st.floats(-2, 2, width=32)
ROWS = st.lists(st.tuples(REWARDS, st.integers(0, 5)), min_size=1, max_size=30)


def by_loop(rewards, groups, kind):
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        centred = reward - statistics.fmean(mine)
        deviation = statistics.stdev(mine) if len(mine) > 1 else 0.0
        advantages.append(centred if kind == "dr_grpo" else centred / (deviation + 1e-6))
    return torch.tensor(advantages)


@given(ROWS)
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_is_the_loop(kind, rows):
    rewards, groups = zip(*[(reward, 10 * group) for reward, group in rows], strict=True)
    got = group_advantages(torch.tensor(rewards), torch.tensor(groups), kind)
    torch.testing.assert_close(got, by_loop(rewards, groups, kind), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, -0.3])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_equal_rewards_and_groups_of_one_teach_nothing(kind, reward, size):
    rewards, groups = torch.full((size,), reward), torch.full((size,), 7)
    assert group_advantages(rewards, groups, kind).tolist() == pytest.approx([0.0] * size, abs=1e-9)


def test_no_rows():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_one_right_of_eight():
    advantage = group_advantages(torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.int64))
    deviation = (1 / 8) ** 0.5
    assert advantage[0] == pytest.approx(7 / 8 / deviation, rel=1e-5)
    assert advantage[1:].tolist() == pytest.approx([-1 / 8 / deviation] * 7, rel=1e-5)


@pytest.mark.parametrize(
    ("length", "want"),
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (105, -1.0)],
)
def test_punishment_is_dapos_equation_13(length, want):
    """Limit 100, cache 20."""
    settings = Algorithm(overlong_cache=20)
    assert overlong_punishment(torch.tensor([length]), 100, settings).item() == pytest.approx(want)
    half = Algorithm(overlong_cache=20, overlong_factor=0.5)
    assert overlong_punishment(torch.tensor([length]), 100, half).item() == pytest.approx(want / 2)


def test_no_punishment_without_a_cache():
    lengths = torch.tensor([1, 100])
    assert overlong_punishment(lengths, 100, Algorithm()).tolist() == [0.0, 0.0]
