"""Responses of every kind in samples.jsonl, and their shares, whatever a step came to."""

import pytest

import trainer.run
import trainer.train
from tests.trainer.small import Even, save_folder, settings
from trainer.config import Data, Reward
from trainer.log import read_rows
from trainer.report.skips import KINDS
from trainer.rewards.terms import is_answered
from trainer.rewards.verifier import Verdicts, Verifier
from trainer.samples import choose
from trainer.sampling import sample_useful
from trainer.tasks.ladder import Ladder
from trainer.tasks.long_ladder import LongLadder
from trainer.train import train


class Odd(Even):
    """Reads one digit; only an even one is right, if that can be."""

    def __init__(self, can: bool = True):
        super().__init__()
        self.can = can

    def reward(self, problem, response):
        return super().reward(problem, response) if self.can else 0.0

    def answered(self, response):
        return response[:1].isdigit()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train on a task; the rows of metrics.jsonl, and those of samples.jsonl."""
    model = save_folder(tmp_path / "model", spread=0.2)

    def run(task, **changes):
        monkeypatch.setattr(trainer.run, "make_task", lambda *_: task)
        changes = {"steps": 2, "samples": 6} | changes
        config = settings(tmp_path, model, **changes)
        train(config)
        return tuple(
            read_rows(tmp_path / config.name / f"{name}.jsonl") for name in ("metrics", "samples")
        )

    return run


def test_a_skipped_step_writes_what_it_sampled(run):
    metrics, samples = run(Odd(can=False))
    assert [row["skipped/few_groups"] for row in metrics[1:]] == [1.0, 1.0]
    assert [row["groups/wanted"] for row in metrics[1:]] == [1.0, 1.0]
    assert [row["step"] for row in samples] == [1] * 6 + [2] * 6
    for row in samples:
        assert row["kind"] in ("wrong", "truncated", "unparsed")
        assert not {"entropy", "selected"} & row.keys()
        assert row["tokens"]
        assert row["reward"] == 0.0


def test_every_kind_that_was_sampled_is_written(run):
    metrics, samples = run(Odd())
    for row in metrics[1:]:
        shares = {kind: row[f"kind/{kind}"] for kind in KINDS}
        assert sum(shares.values()) == pytest.approx(1)
        assert row["response/count"] == row["groups/sampled"] * 4
        assert shares["right"] == pytest.approx(row["reward/mean"])
        found = {sample["kind"] for sample in samples if sample["step"] == row["step"]}
        assert found == {kind for kind, share in shares.items() if share}
        assert len(found) >= 3
    for sample in samples:
        assert (sample["kind"] == "right") == (sample["response"][:1] in tuple("02468"))
        assert (sample["kind"] == "unparsed") <= (not sample["response"][:1].isdigit())


def test_what_is_trained_on_has_its_own_entropies(run):
    """Its step's largest, and the share of selected tokens, are those of the metrics."""
    changes = {"samples": 100, "samples_every": 1}
    metrics, samples = run(Odd(), **changes)
    for row in metrics[1:]:
        scored = [s for s in samples if s["step"] == row["step"] and "entropy" in s]
        entropies = [h for sample in scored for h in sample["entropy"]]
        selected = [one for sample in scored for one in sample["selected"]]
        assert len(entropies) == row["head/rows"]
        assert sum(entropies) / len(entropies) == pytest.approx(row["entropy/mean"], rel=1e-5)
        assert sum(selected) / len(selected) == pytest.approx(row["entropy/selected_fraction"])
        everything = [s for s in samples if s["step"] == row["step"]]
        assert len(everything) == row["response/count"]


def test_dropped_responses_are_among_the_samples(run):
    metrics, samples = run(Odd(), reward=Reward(drop_truncated=True))
    for row in metrics[1:]:
        assert 0 < row["response/dropped"] <= row["response/truncated"] * row["response/count"]
    left_out = [row for row in samples if row["kind"] == "truncated"]
    assert len(left_out) >= 2
    assert not any("entropy" in row for row in left_out)


@pytest.mark.parametrize("can", [True, False], ids=["updates", "skips"])
def test_a_resumed_run_writes_the_same_samples(run, tmp_path, can):
    run(Odd(can), name="whole", steps=4, samples_every=1)
    text = (tmp_path / "whole" / "samples.jsonl").read_text()
    run(Odd(can), steps=3, samples_every=1)
    run(Odd(can), steps=4, samples_every=1)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == text


def test_kinds_take_turns_and_groups_too():
    kinds = ["wrong", "wrong", "truncated", "right", "wrong", "right", "wrong", "unverified"]
    groups = [0, 0, 0, 1, 1, 2, 2, 2]
    rows = range(8)
    assert choose(rows, kinds, groups, 4) == [3, 0, 2, 7]
    assert choose(rows, kinds, groups, 6) == [3, 0, 2, 7, 5, 1]
    assert sorted(choose(rows, kinds, groups, 99)) == list(rows)
    assert choose(rows, kinds, groups, 0) == []
    assert choose([], [], [], 4) == []
    # Those that come first are preferred within a kind.
    assert choose([6, 4, 0, 1, 2, 3, 5, 7], kinds, groups, 3) == [3, 6, 2]


class Timeouts(Verifier):
    """Every second answer takes too long."""

    def verify(self, problems, responses):
        late = [i % 2 == 0 for i in range(len(responses))]
        rewards = [0.0 if over else 1.0 for over in late]
        return Verdicts(rewards, late, [False] * len(late))


def test_what_the_verifier_failed_on_is_a_kind_of_its_own(run, monkeypatch):
    monkeypatch.setattr(trainer.run, "Verifier", Timeouts)
    metrics, samples = run(Odd())
    assert metrics[1]["kind/unverified"] == 0.5
    assert metrics[1]["reward/timeouts"] == 0.5 * metrics[1]["response/count"]
    assert {row["kind"] for row in samples} == {"right", "unverified"}


@pytest.mark.parametrize("right", [1.0, 0.5, 2.0])
def test_right_is_what_the_configuration_calls_right(run, right):
    class Half(Odd):
        def reward(self, problem, response):
            return super().reward(problem, response) * 1.5 - 0.5  # -0.5 or 1.0

    metrics, samples = run(Half(), reward=Reward(right=right))
    kinds = {row["kind"]: row["reward"] for row in samples}
    assert ("right" in kinds) == (right <= 1)
    assert metrics[1]["kind/right"] == (
        pytest.approx((metrics[1]["reward/mean"] + 0.5) / 1.5) if right <= 1 else 0
    )


LADDER = "17+4=21,21-3=18"


@pytest.mark.parametrize(
    ("task", "response", "answered"),
    [
        (Ladder(0), LADDER + "!", True),
        (Ladder(0), LADDER + "?", True),
        (Ladder(0), LADDER, False),
        (Ladder(0), "I think it is 18!", False),
        (Ladder(0), "", False),
        (LongLadder(0), LADDER + "!", True),
        (LongLadder(0), "!", False),
        (Even(), r"so \boxed{4}", True),
        (Even(), "<answer>4</answer>", True),
        (Even(), r"so \boxed{4", False),
        (Even(), "the answer is 4", False),
        (Odd(), "4 5", True),
        (Odd(), r"\boxed{4}", False),
    ],
)
def test_an_answer_is_one_in_the_form_of_the_task(task, response, answered):
    assert is_answered(response, task, Reward()) is answered


def test_an_answer_to_a_verifier_of_ones_own_has_the_form_of_the_configuration():
    reward = Reward(function="a:b", format="#### .+")
    assert is_answered("#### 5", Odd(), reward)
    assert not is_answered("5", Odd(), reward)


def test_a_gym_answer_is_any_last_line():
    gym = pytest.importorskip("trainer.tasks.gym").Gym("basic_arithmetic", 0, Data(), None)
    assert is_answered("thus\n4\n", gym, Reward())
    assert not is_answered(" \n", gym, Reward())


def test_a_step_of_truncated_responses_alone_writes_them(run, monkeypatch):
    def cut(run):
        rollouts, metrics, everything = sample_useful(run)
        rollouts.truncated_B.fill_(True)
        return rollouts, metrics, everything

    monkeypatch.setattr(trainer.train, "sample_useful", cut)
    metrics, samples = run(Odd(), reward=Reward(drop_truncated=True))
    assert [row["skipped/all_truncated"] for row in metrics[1:]] == [1.0, 1.0]
    assert [row["step"] for row in samples] == [1] * 6 + [2] * 6
    assert not any("entropy" in row for row in samples)
