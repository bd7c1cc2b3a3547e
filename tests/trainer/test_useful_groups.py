"""Dynamic sampling: which groups are useful, how many rounds, and what is counted."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.small import build_policy, settings
from trainer.checkpoint import Progress
from trainer.config import Algorithm, Reward, Rollout
from trainer.engines.transformers import TransformersEngine
from trainer.ranks import Ranks
from trainer.rewards.verifier import Verdicts, Verifier
from trainer.run import Run
from trainer.sampling import sample_useful, sort_groups
from trainer.tasks.problem import Problem

VERDICTS = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
ROWS = st.lists(st.tuples(VERDICTS, st.integers(0, 5)), max_size=30)


class Scripted:
    """Groups come out as told: "+" all right, "-" all wrong, "?" useful."""

    name = "scripted"
    num_train = None
    num_test = 4

    def __init__(self, script: str):
        self.script = script
        self.asked: list[int] = []
        self._turn = itertools.cycle([1.0, 0.0])

    def problem(self, split, index):
        self.asked.append(index)
        return Problem("1 + 2 =", (index, self.script[index % len(self.script)]))

    def reward(self, problem, response):
        return {"+": 1.0, "-": 0.0, "?": next(self._turn)}[problem.answer[1]]


def sample_script(script: str, rounds: int, next_problem: int = 0):
    """Three useful groups of two wanted."""
    task = Scripted(script)
    config = settings(
        Path(),
        rollout=Rollout(prompts=3, group_size=2, max_new_tokens=4, batch_size=4),
        algorithm=Algorithm(max_rounds=rounds, min_groups=1),
    )
    progress = Progress(step=1, next_problem=next_problem)
    policy = build_policy()
    verifier = Verifier(task, config.reward)
    engine, ranks = TransformersEngine(policy, batch_size=4), Ranks(policy.device)
    run = Run(config, Path(), ranks, policy, engine, task, verifier, None, None, progress)
    rollouts, metrics, _ = sample_useful(run)
    return rollouts, metrics, run


@given(ROWS, VERDICTS)
def test_groups_are_sorted_as_by_hand(rows, right):
    rewards = torch.tensor([reward for reward, _ in rows])
    groups = torch.tensor([10 * group for _, group in rows], dtype=torch.int64)
    members = {g: {r for r, h in rows if h == g} for _, g in rows}
    got = sort_groups(rewards, groups, Reward(right=right))
    assert got.useful_B.tolist() == [len(members[g]) > 1 for _, g in rows]
    kinds = list(members.values())
    assert (got.useful, got.all_right, got.all_wrong) == (
        sum(len(kind) > 1 for kind in kinds),
        sum(len(kind) == 1 and max(kind) >= right for kind in kinds),
        sum(len(kind) == 1 and max(kind) < right for kind in kinds),
    )


@pytest.mark.parametrize(
    ("script", "bound", "rounds", "kept"),
    [
        ("???", 5, 1, [0, 1, 2]),
        ("+?-?-?", 5, 2, [1, 3, 5]),
        ("+?-", 2, 2, [1, 4]),
        ("+?-", 5, 3, [1, 4, 7]),
        ("+?????", 5, 2, [1, 2, 3]),
        ("+-+", 4, 4, []),
    ],
    ids=["at once", "second round", "bound", "third round", "surplus", "nothing"],
)
def test_rounds(script, bound, rounds, kept):
    rollouts, metrics, run = sample_script(script, bound)
    asked = list(range(3 * rounds))
    assert run.task.asked == asked
    assert run.progress.next_problem == 3 * rounds
    assert [p.answer[0] for p in rollouts.problems] == [i for i in kept for _ in range(2)]
    assert rollouts.group_B.tolist() == [i for i in kept for _ in range(2)]
    assert rollouts.reward_B.tolist() == [1.0, 0.0] * len(kept)
    kinds = [script[i % len(script)] for i in asked]
    assert metrics["groups/sampled"] == len(kinds)
    assert metrics["groups/useful"] == kinds.count("?")
    assert metrics["groups/all_right"] == kinds.count("+")
    assert metrics["groups/all_wrong"] == kinds.count("-")
    right = kinds.count("+") + kinds.count("?") / 2
    assert metrics["reward/mean"] == pytest.approx(right / len(kinds))
    assert metrics["reward/right"] == metrics["reward/mean"]


def test_tokens_count_what_was_left_out_too():
    rollouts, metrics, _ = sample_script("+?-", 3)
    assert len(rollouts) == 6
    assert metrics["tokens"] == pytest.approx(metrics["response/length"] * 2 * 9)
    assert metrics["tokens"] > rollouts.response_length_B.sum()
    assert 0 < metrics["response/truncated"] <= 1


def test_failures_of_the_verifier_are_counted(monkeypatch):
    def verify(self, problems, responses):
        numbers = range(len(responses))
        return Verdicts(
            [float(i % 2) for i in numbers], [i < 2 for i in numbers], [i == 3 for i in numbers]
        )

    monkeypatch.setattr(Verifier, "verify", verify)
    _, metrics, _ = sample_script("???", 1)
    assert (metrics["reward/timeouts"], metrics["reward/crashes"]) == (2.0, 1.0)


def test_the_stream_goes_on_and_rounds_differ():
    """A later step starts where the last ended; each round has random numbers of its own."""
    rollouts, _, run = sample_script("???", 1, next_problem=7)
    assert run.task.asked == [7, 8, 9]
    assert run.progress.next_problem == 10
    assert rollouts.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    rounds, _, _ = sample_script("-?-", 3)
    tokens = [x.tolist() for x in rounds.split(rounds.response_T)]
    assert tokens[:2] != tokens[2:4] != tokens[4:]
