"""Ctrl-C and SIGTERM: what ends, with which line and status, and that a run goes on from there."""

import os
import re
import signal
from pathlib import Path

import pytest

import trainer.run
import trainer.train
from tests.trainer.small import Even, metrics, settings, use_task
from tests.trainer.worlds import run_ranks
from trainer.__main__ import main
from trainer.launch.stop import Stopped, signals_stop
from trainer.log import read_rows
from trainer.presets import PRESETS
from trainer.train import train

SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


class Signalling(Even):
    """Raises `signals` one after the other once training problem `index` is asked for, after it
    was looked at with others before the first step."""

    def __init__(self, *signals, index=9, error=None):
        super().__init__()
        self.signals, self.index, self.error = signals, index, error
        self.times = 0

    def problem(self, split, index):
        self.times += split == "train" and index == self.index
        if split == "train" and index == self.index and self.times == 2:
            for number in self.signals:
                signal.raise_signal(number)
            if self.error:
                raise self.error
        return super().problem(split, index)


@pytest.fixture
def start(model, tmp_path, monkeypatch):
    """`python -m trainer train` of six steps, a checkpoint every three; four problems or more each.

    Problem 9 is asked for in the second or third step.
    """
    config = settings(tmp_path, model, checkpoint_every=3)
    monkeypatch.setitem(PRESETS, "tiny", lambda: config)

    def call(task, *options):
        use_task(task)
        handlers = signal.getsignal(SIGINT), signal.getsignal(SIGTERM)
        status = main(["train", "--root", str(tmp_path), *options])
        assert (signal.getsignal(SIGINT), signal.getsignal(SIGTERM)) == handlers
        return status

    return call


def steps(folder):
    """The last step in metrics.jsonl, and those of the checkpoints."""
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return read_rows(folder / "metrics.jsonl")[-1]["step"], [int(name[5:]) for name in saved]


def test_sigterm_lets_the_step_end_and_saves_it(start, tmp_path, capsys):
    assert start(Signalling(SIGTERM)) == 143
    step, saved = steps(tmp_path / "run")
    assert step in (2, 3)
    assert saved == [0, step]
    said = capsys.readouterr().err
    assert "SIGTERM: the step under way is finished and saved" not in said  # written to the file
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-00000{step}"
    line = f"stopped by SIGTERM after step {step} of 6; the last checkpoint is {checkpoint}\n"
    assert said.endswith(f"{line}to go on: python -m trainer train --root {tmp_path}\n")
    assert start(Even()) == 0
    assert f"start    resuming at step {step} of 6 ({checkpoint})" in capsys.readouterr().out
    assert start(Even(), "--name", "whole") == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_its_notice_comes_at_once(start, capfd):
    assert start(Signalling(SIGTERM)) == 143
    said = capfd.readouterr().err
    assert said.index("SIGTERM: the step under way is finished") < said.index("stopped by SIGTERM")


@pytest.mark.parametrize(
    ("signals", "status", "by"),
    [
        ((SIGTERM, SIGTERM), 143, "SIGTERM"),
        ((SIGTERM, SIGINT), 130, "Ctrl-C"),
        ((SIGINT,), 130, "Ctrl-C"),
    ],
)
def test_ctrl_c_and_a_second_signal_end_the_step(start, tmp_path, capsys, signals, status, by):
    assert start(Signalling(*signals)) == status
    step, saved = steps(tmp_path / "run")
    assert saved == [0]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000"
    line = f"stopped by {by} in step {step + 1} of 6; the last checkpoint is {checkpoint}\n"
    assert line in capsys.readouterr().err


def test_sigterm_in_the_last_step_is_the_end_of_the_run(start, tmp_path, capsys):
    assert start(Signalling(SIGTERM, index=0), "--steps", "1") == 0
    assert steps(tmp_path / "run") == (1, [0, 1])
    assert "report: " in capsys.readouterr().out


def test_a_step_that_fails_after_sigterm_ends_with_its_error_in_the_line(start, capsys):
    """As when the scheduler's signal has ended the engine's processes first."""
    assert start(Signalling(SIGTERM, error=RuntimeError("the engine is dead"))) == 143
    said = capsys.readouterr().err
    failed = r"in step [23] of 6, which failed \(RuntimeError: the engine is dead\); the last"
    assert re.search(failed, said)
    assert "Traceback" not in said


def test_a_step_that_fails_by_itself_keeps_its_traceback(start):
    with pytest.raises(RuntimeError, match="the engine is dead"):
        start(Signalling(error=RuntimeError("the engine is dead")))


@pytest.mark.parametrize(("number", "status"), [(SIGINT, 130), (SIGTERM, 143)])
def test_before_the_first_step_both_end_at_once_and_leave_nothing(
    start, tmp_path, monkeypatch, capsys, number, status
):
    def read(*_, **__):
        signal.raise_signal(number)

    monkeypatch.setattr(trainer.run, "read_policy", read)
    assert start(Even()) == status
    assert not (tmp_path / "run").exists()
    assert "to go on: python -m trainer train" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(SIGINT, 130), (SIGTERM, 143)])
def test_other_commands_end_at_once(monkeypatch, capsys, number, status):
    monkeypatch.setattr("trainer.plan.command.main", lambda _: signal.raise_signal(number))
    assert main(["plan"]) == status
    by = {130: "Ctrl-C", 143: "SIGTERM"}[status]
    assert capsys.readouterr().err == f"\nstopped by {by}\n"


@pytest.mark.parametrize("within", ["the command", "the loop"])
def test_the_error_of_a_rank_is_told_though_sigterm_comes_upon_it(
    start, monkeypatch, capsys, within
):
    """As torchrun sends it to the others once the first of them has ended."""

    def fail(*_):
        try:
            raise ValueError("wrong")
        finally:
            signal.raise_signal(SIGTERM)

    monkeypatch.setenv("RANK", "0")
    if within == "the loop":
        monkeypatch.setattr(trainer.train, "_train", fail)
        assert start(Even()) == 1
    else:
        monkeypatch.setattr("trainer.plan.command.main", fail)
        assert main(["plan"]) == 1
    assert capsys.readouterr().err.endswith("error: wrong\n")


def train_with_a_signal(config, rank):
    """What `rank` of two gets SIGTERM in its step; the step after which each has stopped."""
    task = Signalling(SIGTERM) if os.environ["RANK"] == str(rank) else Even()
    use_task(task)
    try:
        with signals_stop():
            train(config)
    except Stopped as stopped:
        return stopped.signal, stopped.where
    return None


def test_sigterm_to_one_rank_ends_all_after_the_same_step(model, tmp_path):
    config = settings(tmp_path, model, checkpoint_every=3)
    one, other = run_ranks(2, train_with_a_signal, tmp_path / "ranks", config, 1)
    assert one == other
    assert one[0] == SIGTERM
    step, saved = steps(Path(config.root) / "run")
    assert f"after step {step} of 6" in one[1]
    assert saved == [0, step]
