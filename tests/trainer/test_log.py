"""The files of a run: valid JSON whatever happens, and the same after a kill and a resume."""

import json
import math

import pytest
import torch

from tests.trainer.report_cases import terminal
from trainer.config import Config
from trainer.log import RunLog, Sample, read_rows
from trainer.report.progress import WARM_START, progress


@pytest.fixture
def log(tmp_path):
    return RunLog.open(tmp_path / "runs" / "a", Config())


def strict(line: str):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(line, parse_constant=refuse)


def sample(text: str = "ab") -> Sample:
    return Sample("p", text, 1.0, list(text), [0.5] * len(text), [True] * len(text))


def test_run_json_tells_of_every_start(log):
    RunLog.open(log.folder, Config(seed=7), device="a GPU")
    run = json.loads((log.folder / "run.json").read_text())
    assert run["config"]["seed"] == 7
    assert run["config"]["rollout"]["group_size"] == 8
    assert [start["device"] for start in run["starts"]] == ["", "a GPU"]
    assert run["starts"][0]["versions"]["torch"] == torch.__version__
    assert set(run["starts"][0]["versions"]) == {
        "python",
        "torch",
        "transformers",
        "entropy_kernels",
    }


def test_commit_is_unknown_outside_git(log, monkeypatch):
    monkeypatch.setenv("PATH", "")
    RunLog.open(log.folder, Config())
    start = json.loads((log.folder / "run.json").read_text())["starts"][-1]
    assert (start["commit"], start["dirty"]) == ("unknown", None)


def test_rows_are_written_at_once_with_step_first(log):
    log.write({"loss": torch.tensor(0.5, requires_grad=True), "step": torch.tensor(3)})
    log.write({"step": 4, "head/rows": 12, "entropy/below_0.01": torch.ones(1).bfloat16()})
    first, second = log.metrics_path.read_text().splitlines()
    assert first == '{"step": 3, "loss": 0.5}'
    assert second == '{"step": 4, "head/rows": 12, "entropy/below_0.01": 1.0}'


def test_what_is_not_finite_is_null_and_counted(log):
    log.write({"step": 1, "loss": math.nan, "ratio/max": torch.tensor(math.inf), "lr": 0.1})
    row = strict(log.metrics_path.read_text())
    assert row == {"step": 1, "loss": None, "ratio/max": None, "lr": 0.1, "log/nonfinite": 2}
    log.samples(1, [Sample("p", "a", math.inf, ["a"], [math.nan], [False])])
    row = strict(log.samples_path.read_text())
    assert (row["reward"], row["entropy"]) == (None, [None])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loss": 1.0}, "integer step"),
        ({"step": 1.5}, "integer step"),
        ({"step": math.nan}, "integer step"),
        ({"step": 1, "Loss Total": 1.0}, "group/name"),
        ({"step": 1, "loss": torch.ones(2)}, "shape"),
        ({"step": 1, "loss": {"a": 1.0}}, "dict"),
    ],
)
def test_rows_that_are_not_metrics_are_refused(log, row, message):
    with pytest.raises(ValueError, match=message):
        log.write(row)
    assert not log.metrics_path.exists()


def test_samples_hold_each_token(log):
    log.samples(2, [sample("añ\u2028<"), sample()])
    rows = read_rows(log.samples_path)
    assert [row["response"] for row in rows] == ["añ\u2028<", "ab"]
    fields = ["step", "prompt", "response", "reward", "tokens", "entropy", "selected", "kind"]
    assert list(rows[0]) == fields
    log.samples(3, [Sample("p", "ab", 1.0, ["a", "b"], [], [], "wrong")])  # not trained on
    with pytest.raises(ValueError, match="2 tokens, 1 entropies and 2 flags"):
        log.samples(2, [Sample("p", "ab", 1.0, ["a", "b"], [0.5], [True, False])])


def run(log: RunLog, steps: range) -> None:
    for step in steps:
        log.write({"step": step, "reward/mean": step / 7})
        if step % 2 == 0:
            log.samples(step, [sample(), sample("c" * step)])


@pytest.mark.parametrize("torn", ["", "{", '{"step": 8, "reward/me', '{"step": 8'])
def test_a_resumed_run_has_the_files_of_an_uninterrupted_one(log, tmp_path, torn):
    whole = RunLog.open(tmp_path / "whole", Config())
    run(whole, range(10))
    run(log, range(8))
    for path in (log.metrics_path, log.samples_path):
        with path.open("a") as file:
            file.write(torn)
    log = RunLog.open(log.folder, Config())
    log.rewind(4)
    run(log, range(5, 10))
    assert log.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    assert log.samples_path.read_bytes() == whole.samples_path.read_bytes()
    assert not list(log.folder.glob("*.tmp"))


def test_a_torn_line_within_the_checkpoint_is_dropped_too(log):
    log.metrics_path.write_text('{"step": 1}\n{"step": 2, "lo')
    log.rewind(2)
    assert log.metrics_path.read_text() == '{"step": 1}\n'


def test_rewind_before_the_first_step_empties(log):
    log.rewind(-1)
    run(log, range(3))
    log.rewind(-1)
    assert log.metrics_path.read_text() == log.samples_path.read_text() == ""


@pytest.mark.parametrize("text", ['{"st\n{"step": 2}\n', '{"step": 1}\n{"st\n', '[1]\n{"step": 1}'])
def test_broken_lines_elsewhere_are_refused(log, text):
    log.metrics_path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line \d"):
        log.rewind(1)
    assert log.metrics_path.read_text() == text


def test_plain_lines_where_no_terminal_is(capsys):
    row = {"clip/low": 0.01, "clip/high": torch.tensor(0.02), "eval/accuracy": 0.25}
    with progress("RL", 120) as bar:
        bar.update(0, row)
        for step in range(1, 121):
            bar.update(step, {"reward/mean": step / 120, "tokens_per_second": 1234.5})
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert out.replace("\n", "").isprintable()
    assert 20 <= len(lines) <= 25
    assert lines[0] == "RL 0/120  clip 3.00%  accuracy 25.0%"
    assert lines[-1] == (
        "RL 120/120  0:00:00 left  reward 1.00  tokens/s 1,234  accuracy 25.0% at step 0"
    )


def test_a_live_bar_on_a_terminal(monkeypatch):
    drawn = terminal(monkeypatch)
    with progress("warm start", 10, start=4, columns=WARM_START) as bar:
        bar.update(5, {"loss": 0.75})
    for text in ("warm start", "5/10", "loss 0.750"):
        assert text in drawn.getvalue()


def test_a_start_counts_the_steps_of_earlier_ones(capsys):
    """A resumed run whose last step is skipped has updated its weights before."""
    skipped = {"skipped/few_groups": 1.0, "updates": 0.0}
    earlier = [
        {"step": 0, "eval/accuracy": 0.5},
        {"step": 1, "updates": 1.0},
        {"step": 2, **skipped},
    ]
    with progress("RL", 3, start=2) as bar:
        bar.recall(earlier)
        bar.update(3, skipped)
    out = capsys.readouterr().out
    assert out.startswith("RL 3/3")
    assert "skipped: few useful groups (2 of 3)  accuracy 50.0% at step 0" in out
    assert "No step updated" not in out


def test_what_a_fresh_run_begins_with_is_shown(capsys):
    with progress("RL", 3) as bar:
        bar.recall(
            [{"step": 0, "eval/accuracy": 0.5, "eval/timeouts": 2.0, "eval/a.timeouts": 1.0}]
        )
    assert capsys.readouterr().out == (
        "RL 0/3  accuracy 50.0%  verifier time-outs in evaluation 3\n"
    )
