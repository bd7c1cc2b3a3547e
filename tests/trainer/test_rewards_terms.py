"""What is added to the verdict, against its definition, and truncated responses left out."""

import json

import pytest
import torch

from tests.trainer.small import Even, make_rollouts, settings
from trainer.batch import Rollouts
from trainer.config import Algorithm, Reward, Rollout
from trainer.rewards.terms import has_format, shaped_reward
from trainer.train import train


@pytest.mark.parametrize(
    ("form", "response", "right"),
    [
        ("boxed", "so \\boxed{\\frac{1}{2}}.", True),
        ("boxed", "so \\boxed{1", False),
        ("boxed", "so 1", False),
        ("answer", "<answer>\n1\n</answer>", True),
        ("answer", "<answer>1", False),
        ("answer", "</answer>1<answer>", False),
        (r"^<think>.*</think>\s*\d+$", "<think>so</think> 12", True),
        (r"^<think>.*</think>\s*\d+$", "<think>so 12", False),
    ],
)
def test_form(form, response, right):
    assert has_format(response, form) is right


def rollouts(lengths, responses, rewards) -> Rollouts:
    tokens = [[0] * length for length in lengths]
    fields = {"responses": responses, "reward_B": torch.tensor(rewards)}
    return make_rollouts([[0]] * len(lengths), tokens, **fields)


def test_terms_add_to_the_verdict(tmp_path):
    """100 tokens at most, 20 of them punished: 10 of those is half."""
    sampled = rollouts([50, 90, 100], ["\\boxed{1}", "2", "\\boxed{3}"], [1.0, 1.0, 0.0])
    shape = Rollout(max_new_tokens=100)
    plain, metrics = shaped_reward(sampled, settings(tmp_path, rollout=shape))
    assert plain.tolist() == [1.0, 1.0, 0.0]
    assert metrics == {}
    config = settings(
        tmp_path,
        rollout=shape,
        reward=Reward(format_weight=0.25),
        algorithm=Algorithm(overlong_cache=20, min_groups=1),
    )
    shaped, metrics = shaped_reward(sampled, config)
    assert shaped.tolist() == [1.25, 0.5, -0.75]
    assert metrics["reward/format"] == pytest.approx(2 / 3)
    assert metrics["reward/overlong"] == pytest.approx(-0.5)
    assert sampled.reward_B.tolist() == [1.0, 1.0, 0.0]


class Alternating(Even):
    """Every other response is right, so that every group is useful."""

    asked = 0

    def reward(self, problem, response):
        self.asked += 1
        return float(self.asked % 2)


def run(folder, monkeypatch, tokens, **reward):
    """The metrics of the first step."""
    monkeypatch.setattr("trainer.run.make_task", lambda *_: Alternating())
    shape = Rollout(prompts=4, group_size=4, max_new_tokens=tokens, batch_size=16)
    train(settings(folder, steps=1, rollout=shape, reward=Reward(**reward)))
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[1])


def test_truncated_responses_can_be_left_out(tmp_path, monkeypatch):
    with_all = run(tmp_path / "all", monkeypatch, 24)
    without = run(tmp_path / "without", monkeypatch, 24, drop_truncated=True)
    assert "response/dropped" not in with_all
    truncated = with_all["response/truncated"] * 16
    assert 0 < truncated < 16
    assert without["response/dropped"] == truncated
    assert without["reward/mean"] == with_all["reward/mean"]
    assert without["head/rows"] < with_all["head/rows"]
    assert with_all["reward/timeouts"] == with_all["reward/crashes"] == 0


def test_a_step_of_truncated_responses_alone_is_skipped(tmp_path, monkeypatch):
    metrics = run(tmp_path, monkeypatch, 2, drop_truncated=True)
    assert metrics["response/truncated"] == 1.0
    assert metrics["response/dropped"] == 16.0
    assert metrics["skipped/all_truncated"] == 1.0
    assert "head/rows" not in metrics
