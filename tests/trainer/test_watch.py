"""Following a run: what is shown, as it comes, until it ends."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

import trainer.report.watch
from tests.trainer.report_cases import terminal
from trainer.__main__ import main
from trainer.config import Config
from trainer.log import RunLog, read_rows
from trainer.report.page import write_report
from trainer.report.standing import standing
from trainer.report.watch import sparkline, watch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(trainer.report.watch, "SECONDS", 0.01)


def lock(folder, pid=None, host=None):
    """As the process that works in `folder` does."""
    owner = {"host": host or socket.gethostname(), "pid": pid or os.getpid()}
    (folder / ".lock").write_text(json.dumps(owner))


@pytest.fixture
def log(tmp_path):
    """A run that is under way."""
    log = RunLog.open(tmp_path / "run", Config(steps=3))
    lock(log.folder)
    return log


def skipped(step, useful=1.0):
    return {
        "step": step,
        "reward/mean": 0.0,
        "reward/timeouts": 32.0,
        "response/count": 32.0,
        "response/truncated": 0.9,
        "kind/truncated": 0.9,
        "kind/unparsed": 0.1,
        "groups/useful": useful,
        "groups/wanted": 4.0,
        "groups/all_right": 0.0,
        "groups/all_wrong": 8.0 - useful,
        "groups/sampled": 8.0,
        "skipped/few_groups": 1.0,
        "time/step": 2.0,
    }


def row(step, **metrics):
    base = {"step": step, "reward/mean": step / 4, "entropy/mean": 0.5, "time/step": 2.0}
    return base | {"tokens_per_second": 1000.0 * step} | metrics


def wait_for(capsys, text, seen=""):
    """The lines printed from now until `text` is there."""
    until = time.monotonic() + 300
    while text not in seen or not seen.endswith("\n"):
        assert time.monotonic() < until, seen
        time.sleep(0.01)
        seen += capsys.readouterr().out
    return seen


def looked_twice(monkeypatch):
    """Wait until the watcher has looked at the file as it is now, and shown what it saw."""
    looks, sleep = threading.Semaphore(0), time.sleep

    def count(seconds):
        looks.release()
        sleep(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.report.watch.time, "sleep", count)
        assert all(looks.acquire(timeout=300) for _ in range(2))


@pytest.fixture
def watching(log, capsys):
    """A thread that watches the run, once the test starts it: before, nothing is captured."""
    thread = threading.Thread(target=watch, args=(log.folder,), daemon=True)
    yield thread
    thread.join(300)
    assert not thread.is_alive()


def test_lines_come_with_the_steps_and_end_with_the_run(log, capsys, watching):
    watching.start()
    log.write({"step": 0, "eval/accuracy": 0.25})
    seen = wait_for(capsys, "0/3").splitlines()
    assert seen[-1] == "0/3  accuracy 25.0%"
    assert all(line.startswith("no step yet; it started 0:00:0") for line in seen[:-1])
    log.write(row(1))
    log.write(row(2))
    seen = wait_for(capsys, "2/3")
    assert seen.startswith("1/3  reward 0.25  tokens/s 1,000  entropy 0.500\n2/3  reward 0.50")
    log.write(row(3, **{"eval/accuracy": 0.5}))
    watching.join(300)
    assert capsys.readouterr().out.endswith("accuracy 50.0%  entropy 0.500\n")


def test_a_run_that_goes_back_to_its_checkpoint_is_followed(log, capsys, watching):
    watching.start()
    for step in range(3):
        log.write(row(step))
    wait_for(capsys, "2/3")
    log.rewind(1)
    assert wait_for(capsys, "\n") == "back at 1/3\n"
    log.write(row(2, **{"reward/mean": 0.75}))
    assert wait_for(capsys, "\n").startswith("2/3  reward 0.75")
    log.write(row(3))


def test_a_torn_line_waits_and_a_null_is_no_number(log, capsys, watching, monkeypatch):
    watching.start()
    log.write(row(1, **{"reward/mean": float("nan")}))
    seen = wait_for(capsys, "1/3").splitlines()[-1]
    assert seen.startswith("1/3  reward not finite  tokens/s 1,000")
    assert seen.endswith("1 value not finite")
    with log.metrics_path.open("a") as file:
        file.write('{"step": 2, "reward')
        file.flush()
        looked_twice(monkeypatch)
        assert capsys.readouterr().out == ""
        file.write('/mean": 0.5}\n')
    assert wait_for(capsys, "\n") == "2/3  reward 0.50\n"
    log.write(row(3))


def test_a_terminal_shows_the_last_numbers_and_their_course(log, monkeypatch):
    for step in range(4):
        log.write(row(step, **({"eval/accuracy": 0.1 * step} if step % 2 else {})))
    drawn = terminal(monkeypatch)
    watch(log.folder)
    text = drawn.getvalue()
    assert "run  step 3/3  ended 0:00:00 ago" in text
    assert "reward     0.75  ▁▃▆█" in text.replace("\x1b[2K", "")
    assert "tokens/s  3,000  ▁▃▆█" in text
    assert "accuracy  30.0%  ▁█" in text
    assert "entropy   0.500  ▁▁▁▁" in text


def test_what_is_left_counts_evaluations(log):
    log.write(row(1))
    log.write(row(2, **{"time/evaluate": 4.0}))
    assert "step 2/12  0:00:40 left" in screen(log, 12)


def screen(log, steps):
    """What a terminal shows now."""
    console = Console(file=io.StringIO(), width=100)
    rows = read_rows(log.metrics_path) if log.metrics_path.exists() else []
    view = trainer.report.watch.View(rows, standing(log.folder, rows, steps))
    console.print(trainer.report.watch._screen(log.folder, view))
    return console.file.getvalue()


def test_a_terminal_shows_why_nothing_comes(log):
    assert "run: no step yet; it started 0:00:00 ago" in screen(log, 12)
    log.write(row(1))
    (log.folder / ".lock").unlink()
    assert "stopped at step 1 of 12, 0:00:00 ago; the same command resumes it" in screen(log, 12)
    lock(log.folder)
    past(log, 600)
    assert "last step 0:10:00 ago; steps take less than 0:01:00" in screen(log, 12)


def test_a_terminal_shows_what_skipped_steps_are(log):
    """And no number of an earlier step as if it were new."""
    log.write(row(1, **{"eval/accuracy": 0.25, "eval/aime24.accuracy": 0.1}))
    assert "skipped" not in screen(log, 12)
    for step in range(2, 7):
        log.write(skipped(step))
    seen = screen(log, 12)
    assert "skipped: 1 useful group, 4 wanted (5 of 6)" in seen
    assert "verifier time-outs 32 of 32" in seen
    assert "The last 5 steps updated nothing; skipped: few useful groups." in seen
    assert "responses: 90% truncated, 10% unparsed; groups: 1 useful, 0 all right, 7 al" in seen
    assert "Most responses hit rollout.max_new_tokens." in seen
    lines = {line.split()[0]: line.split() for line in seen.splitlines()}
    assert lines["reward"] == ["reward", "0.00", "█▁▁▁▁▁"]
    assert lines["entropy"][-3:] == ["at", "step", "1"]
    assert lines["aime24"] == ["aime24", "10.0%", "▁", "at", "step", "1"]
    log.write(row(7))
    seen = screen(log, 12)
    assert "skipped 5 of 7" in seen
    assert "updated nothing" not in seen


def test_lines_tell_of_skipped_steps(log, capsys):
    RunLog.open(log.folder, Config(steps=6))
    for step in range(1, 7):
        log.write(skipped(step))
    watch(log.folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "1/6  skipped: 1 useful group, 4 wanted (1 of 1)  reward 0.00  truncated 90.0%  "
        "verifier time-outs 32 of 32"
    )
    assert lines[5] == "warning: No step updated the weights: 5 of 5 skipped, few useful groups."
    assert lines[6] == (
        "  responses: 90% truncated, 10% unparsed; groups: 1 useful, 0 all right, 7 all wrong"
    )
    assert "warning: No step updated the weights: 6 of 6 skipped, few useful groups." in lines


def past(log, seconds):
    """As if the run had written nothing for so long."""
    then = time.time() - seconds
    os.utime(log.metrics_path, (then, then))


def test_a_run_that_stops_and_goes_on_is_followed(log, capsys, watching):
    watching.start()
    log.write(row(1))
    wait_for(capsys, "1/3")
    (log.folder / ".lock").unlink()
    seen = wait_for(capsys, "stopped")
    assert seen.startswith("stopped at step 1 of 3, 0:00:0")
    lock(log.folder)
    RunLog.open(log.folder, Config(steps=4))
    log.write(row(2))
    assert wait_for(capsys, "2/4").startswith("2/4  reward 0.50")
    log.write(row(3))
    log.write(row(4))
    watching.join(300)


def test_a_run_that_is_killed_has_stopped(log, capsys, watching):
    """Its lock's file is still there, its process is not."""
    watching.start()
    log.write(row(1))
    wait_for(capsys, "1/3")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    lock(log.folder, pid=process.pid)
    assert wait_for(capsys, "stopped").startswith("stopped at step 1 of 3")
    log.write(row(3))


def test_a_silent_run_is_told_once_and_again_after_twice_the_time(log, capsys, watching):
    watching.start()
    log.write(row(1))
    wait_for(capsys, "1/3")
    past(log, 200)
    assert wait_for(capsys, "ago").startswith("last step 0:03:20 ago; steps take less than 0:01:0")
    past(log, 230)
    past(log, 300)
    assert wait_for(capsys, "ago").startswith("last step 0:05:00 ago")
    log.write(row(3))


def test_a_run_on_another_machine_is_one_that_writes(log):
    lock(log.folder, host="elsewhere")
    log.write(row(1))
    assert standing(log.folder, [row(1)], 3).word == "running"
    past(log, 61)
    assert standing(log.folder, [row(1)], 3).word == "stopped"
    past(log, 300)
    slow = [row(1, **{"time/step": 100.0})]
    assert standing(log.folder, slow, 3).word == "running"


def test_a_run_is_followed_before_it_has_anything(tmp_path, capsys):
    """While its model is read and warmed up, there is its lock alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock(folder)
    thread = threading.Thread(target=watch, args=(folder,), daemon=True)
    thread.start()
    assert wait_for(capsys, "\n").startswith("no step yet; it started 0:00:0")
    log = RunLog.open(folder, Config(steps=1))
    log.write(row(0))
    log.write(row(1))
    thread.join(300)
    assert not thread.is_alive()
    assert capsys.readouterr().out.splitlines()[-1].startswith("1/1")


def test_what_is_no_run_is_told_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="runs/x does not exist: wanted the folder of a run"):
        watch(tmp_path / "runs" / "x")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="file is a file: wanted the folder of a run"):
        watch(file)
    for name in ("80-20/0", "80-20/1", "all/0", "all/1"):
        RunLog.open(tmp_path / "comparison" / "ladder" / name, Config())
    for function in (watch, write_report):
        with pytest.raises(ValueError, match=r"holds 4 runs, and is not one: choose .*or another"):
            function(tmp_path / "comparison")
    RunLog.open(tmp_path / "root" / "only", Config())
    with pytest.raises(ValueError, match=r"holds 1 run, and is not one: choose .*only$"):
        watch(tmp_path / "root")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0.0, 7.0, 3.0], "▁█▄"),
        ([1.0, None, 2.0], "▁ █"),
        ([5.0, 5.0], "▁▁"),
        ([None], " "),
        ([], ""),
        (list(range(8)), "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values, line):
    assert sparkline(values) == line


def test_the_command(log, capsys, monkeypatch):
    for step in range(4):
        log.write(row(step))
    assert main(["watch", str(log.folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["watch"]) == 1
    assert "watch takes one run's folder; got 0" in capsys.readouterr().err
    assert main(["watch", str(log.folder.parent)]) == 1
    assert "holds 1 run, and is not one" in capsys.readouterr().err

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.report.watch, "watch", interrupt)
    assert main(["watch", str(log.folder)]) == 0
    assert capsys.readouterr().err == ""
