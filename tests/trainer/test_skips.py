"""Steps that update nothing: counted, told with their reason, and loudly where they go on."""

import dataclasses
import math
from random import Random

import pytest

import trainer.run
import trainer.train
from tests.trainer.report_cases import metrics_row, skipped_row, terminal
from tests.trainer.small import Even, save_folder, settings
from trainer.log import read_rows
from trainer.report.progress import progress
from trainer.report.skips import Skips, advice, composition, reason, reasons
from trainer.train import train

FEW = {"skipped/few_groups": 1.0, "groups/useful": 2.0, "groups/wanted": 4.0, "reward/mean": 0.0}
UPDATED = {"loss": 0.1, "updates": 2.0, "entropy/threshold": 0.5, "reward/mean": 0.5}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (FEW, "2 useful groups, 4 wanted"),
        (FEW | {"groups/useful": 1.0}, "1 useful group, 4 wanted"),
        ({"skipped/few_groups": 1.0}, "few useful groups"),
        ({"skipped/all_truncated": 1.0}, "every response truncated"),
        ({"skipped/something_new": 1.0}, "something new"),
        ({"loss": 0.1, "updates": 0.0, "skipped/nonfinite_gradient": 2.0}, "gradient not finite"),
        ({"skipped/nonfinite_old_logprob": 1.0}, "old logprob not finite"),
        ({"loss": 0.0, "updates": 0.0, "skipped/no_tokens": 2.0}, "no token selected"),
        ({"skipped/no_tokens": 1.0, "skipped/x": 1.0}, "no token selected, x"),
        # One mini-batch of two was skipped.
        ({"loss": 0.1, "updates": 1.0, "skipped/nonfinite_gradient": 1.0}, ""),
        (UPDATED | {"skipped/nonfinite_gradient": 0.0}, ""),
        # Runs of before did not count updates.
        ({"loss": 0.1, "skipped/truncated": 3.0}, ""),
        ({"loss": None, "skipped/nonfinite_gradient": 0.0}, ""),
        ({"eval/accuracy": 0.5}, ""),
    ],
)
def test_a_step_that_updates_nothing_has_a_reason(row, words):
    assert reason({"step": 3} | row) == words
    assert bool(reasons(row)) == bool(words)


def test_steps_are_counted_and_told_ever_more_rarely():
    skips, loud = Skips(), []
    assert skips.add({"step": 0, "eval/accuracy": 0.5}) == ""
    assert not skips.never
    for step in range(1, 101):
        if skips.add({"step": step} | FEW):
            loud.append(step)
        assert skips.never
    assert loud == [5, 10, 20, 40, 80]
    assert (skips.steps, skips.skipped, skips.in_a_row) == (100, 100, 100)
    assert skips.headline().startswith("No step updated the weights: 100 of 100 skipped, few us")
    assert skips.add({"step": 101} | UPDATED) == skips.headline() == ""
    assert not skips.never
    warnings = [skips.add({"step": 102 + i} | FEW) for i in range(5)]
    assert warnings[:4] == [""] * 4
    assert warnings[4].startswith("warning: The last 5 steps updated nothing; skipped: few useful")


def test_every_second_step_skipped_is_not_loud():
    skips = Skips()
    for step in range(1, 101):
        assert skips.add({"step": step} | (FEW if step % 2 else UPDATED)) == ""
    assert (skips.skipped, skips.steps) == (50, 100)


@pytest.mark.parametrize(
    ("row", "look"),
    [
        ({"response/truncated": 0.6}, "rollout.max_new_tokens"),
        ({"kind/unparsed": 0.6}, "data.template"),
        ({"kind/unverified": 0.6}, "reward.seconds"),
        ({"groups/all_right": 6.0}, "too easy"),
        ({"groups/all_wrong": 6.0}, "too hard"),
        ({"response/truncated": math.nan, "kind/unparsed": None}, "samples.jsonl"),
    ],
)
def test_it_is_said_what_to_look_at(row, look):
    told = advice({"groups/sampled": 8.0} | row)
    assert look in told[0]
    assert len(told) == (1 if look == "samples.jsonl" else 2)


def test_the_composition_of_a_step():
    row = {"kind/right": 0.25, "kind/wrong": 0.0, "kind/unparsed": 0.75, "groups/all_right": 3.0}
    assert composition(row) == "responses: 25% right, 75% unparsed; groups: 3 all right"
    assert composition({}) == ""


def test_a_skipped_step_shows_its_own_numbers_alone(capsys, random):
    with progress("RL", 4) as bar:
        bar.update(1, metrics_row(random, 1, 4) | {"eval/accuracy": 0.5, "eval/a.accuracy": 0.75})
        bar.update(2, FEW)
        bar.update(3, FEW | {"reward/timeouts": 32.0, "response/count": 32.0})
        bar.update(4, UPDATED | {"loss": math.nan, "reward/crashes": 1.0})
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert "threshold" in first
    assert "skipped" not in first
    assert first.endswith("accuracy 50.0%  a 75.0%")
    assert second.split("left  ")[1] == (
        "skipped: 2 useful groups, 4 wanted (1 of 2)  reward 0.00  accuracy 50.0% at step 1"
    )
    assert "verifier time-outs 32 of 32" in third
    assert last.split("left  ")[1] == (
        "skipped 2 of 4  reward 0.50  threshold 0.50  verifier crashes 1  1 value not finite  "
        "accuracy 50.0% at step 1"
    )


def test_an_accuracy_of_each_step_is_shown_once(capsys):
    """As a standalone evaluation shows it."""
    with progress("evaluation", 2, columns={"accuracy": (("accuracy",), ".1%")}) as bar:
        bar.update(1, {"accuracy": 0.5})
        bar.update(2, {"accuracy": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("left  ")[1] for line in lines] == ["accuracy 50.0%", "accuracy 25.0%"]


@pytest.mark.parametrize("steps", [3, 7])
def test_a_run_that_never_updated_ends_with_it(capsys, random, steps):
    with progress("RL", steps) as bar:
        for step in range(1, steps + 1):
            bar.update(step, skipped_row(random, step))
    out = capsys.readouterr().out
    assert f"warning: No step updated the weights: {steps} of {steps} skipped" in out
    assert out.count("warning") == 1 + (steps > 5)
    assert "samples.jsonl has responses of every kind." in out


def test_a_warning_stands_above_a_live_bar(monkeypatch, random):
    drawn = terminal(monkeypatch)
    with progress("RL", 10) as bar:
        for step in range(1, 6):
            bar.update(step, skipped_row(random, step))
    assert "warning: No step updated the weights: 5 of 5 skipped" in drawn.getvalue()


def test_a_run_whose_gradients_are_not_finite_never_updates(tmp_path, monkeypatch, capsys):
    """Each step has a loss, and updates nothing."""

    update = trainer.train.update

    def poisoned(*arguments):
        metrics, seconds = update(*arguments)
        return metrics | {"skipped/nonfinite_gradient": 1.0}, seconds

    monkeypatch.setattr(trainer.run, "make_task", lambda *_: Even())
    config = settings(tmp_path, save_folder(tmp_path / "model"), steps=1)
    train(config)
    monkeypatch.setattr(trainer.train, "update", poisoned)
    train(dataclasses.replace(config, name="other", steps=2))
    own, other = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "other"))
    assert own[1]["updates"] == config.optimizer.mini_batches == 2
    assert [row["updates"] for row in other[1:]] == [0, 0]
    told = "No step updated the weights: 2 of 2 skipped, gradient not finite."
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "other" / "report.html").read_text()


@pytest.fixture
def random():
    return Random(0)
