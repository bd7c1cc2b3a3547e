"""What a verifier may return, and that runs are the same in every scale of its verdicts."""

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.trainer.small import Even, settings
from tests.trainer.test_tokens_page import page, sample
from trainer.config import Optimizer, Reward
from trainer.evaluation.estimates import estimate
from trainer.rewards.verifier import Verifier
from trainer.rewards.worker import as_verdict
from trainer.tasks.problem import Problem
from trainer.train import train


class Scaled(Even):
    """Gives the second of `verdicts` for an even first digit, else the first."""

    def __init__(self, verdicts):
        super().__init__()
        self.verdicts = verdicts

    def reward(self, problem, response):
        return self.verdicts[int(super().reward(problem, response))]


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (True, 1.0),
        (2, 2.0),
        (-1, -1.0),
        (0.25, 0.25),
        (-0.0, 0.0),
        (3e38, 3e38),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.int8(-1), -1.0),
        (np.array(0.5), 0.5),
        (torch.tensor(True), 1.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (Fraction(1, 4), 0.25),
        (Decimal("0.5"), 0.5),
    ],
    ids=repr,
)
def test_numbers_and_truth_values_are_verdicts(value, verdict):
    got = as_verdict(value)
    assert type(got) is float
    assert got == verdict


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", b"1", [1.0], {}, (1,), 1j, float("nan"), float("inf"), -float("inf")),
        *(1e39, 10**400, Fraction(10**400), Decimal("nan"), np.float64("nan"), np.complex64(1)),
        *(np.array([1.0]), np.zeros((2, 2)), torch.ones(1), torch.tensor(float("inf")), np.str_(1)),
        *(print, object),
    ],
    ids=repr,
)
def test_anything_else_ends_in_one_line_that_names_all(value):
    with pytest.raises(ValueError, match=r"must return a number, finite in fp32; got .*, a \w+$"):
        as_verdict(value)
    verifier, problem = Verifier(Scaled((value, value)), Reward()), Problem("1 +\n2 =", None)
    with pytest.raises(ValueError, match=r"Scaled\.reward must return .* for the prompt") as raised:
        verifier.verify([problem], ["3\n"])
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(r"for the prompt '1 +\n2 =', response '3\n'")


def test_the_mean_of_the_largest_verdicts_is_a_number(tmp_path, monkeypatch):
    rows = run(tmp_path, monkeypatch, (3e38, 3e38))
    assert all(row["reward/mean"] == pytest.approx(3e38) for row in rows)
    assert not any(row.get("log/nonfinite") for row in rows)


def run(folder, monkeypatch, verdicts, **reward):
    """The metrics of three steps."""
    monkeypatch.setattr("trainer.run.make_task", lambda *_: Scaled(verdicts))
    # At a larger rate AdamW turns the rounding of an advantage into a step of its own.
    optimizer = Optimizer(learning_rate=1e-4, tokens_per_micro_batch=64)
    train(settings(folder, steps=3, reward=Reward(**reward), optimizer=optimizer))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"]]


SCALES = {
    "0 and 2": ((0, 2), {}),
    "-1 and 1": ((-1, 1), {}),
    "partial": ((0.2, 0.7), {"right": 0.7}),
    "large and negative": ((-1e30, -1e29), {"right": -1e29}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(tmp_path_factory.mktemp("plain"), monkeypatch, (0.0, 1.0))


@pytest.mark.parametrize("name", SCALES)
def test_a_run_is_the_same_in_every_scale(name, plain, tmp_path, monkeypatch):
    """Advantages, and so tokens and losses; the mean verdict alone has the scale."""
    (wrong, right), options = SCALES[name]
    rows = run(tmp_path, monkeypatch, (wrong, right), **options)
    assert sum(row["groups/useful"] for row in plain) >= 3
    for row, other in zip(rows, plain, strict=True):
        for key in ("tokens", "reward/right", "groups/useful", "groups/all_right"):
            assert row[key] == other[key], key
        assert row["groups/all_wrong"] == other["groups/all_wrong"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-6)
        share = other["reward/right"]
        assert share == other["reward/mean"]
        mean = float(wrong) * (1 - share) + float(right) * share
        scale = max(abs(float(wrong)), abs(float(right)))
        assert row["reward/mean"] == pytest.approx(mean, rel=1e-5, abs=1e-5 * scale)


def test_partial_verdicts_are_right_from_where_the_configuration_says():
    """0.7 in fp32 is a little less."""
    kept = torch.tensor([0.7, 0.69, 1.0])
    assert Reward(right=0.7).is_right(kept).tolist() == [True, False, True]
    assert [Reward(right=0.7).is_right(verdict) for verdict in kept.tolist()] == [True, False, True]
    assert not Reward().is_right(0.99)
    assert Reward(right=-3.0).is_right(-3.0)


@pytest.mark.parametrize(("verdict", "right", "shown"), [(0.5, 1.0, "wrong"), (0, 0, "right")])
def test_the_page_of_tokens_says_what_is_right(verdict, right, shown, tmp_path):
    text = page(tmp_path, [sample(["x"], [0.2], verdict)], right=right)
    assert f'class="is-{shown}"' in text


def test_shares_outside_0_and_1_are_refused():
    with pytest.raises(ValueError, match=r"an estimate needs shares in \[0, 1\]; got 0 to 2"):
        estimate([0.0, 2.0], 1)
