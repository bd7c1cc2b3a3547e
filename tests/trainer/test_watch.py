"""Following a run: what is shown, as it comes, until it ends."""

import io
import sys
import threading
import time

import pytest
from rich.console import Console

import trainer.watch
from trainer.__main__ import main
from trainer.config import Config
from trainer.log import RunLog
from trainer.watch import sparkline, watch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(trainer.watch, "SECONDS", 0.01)


@pytest.fixture
def log(tmp_path):
    return RunLog.open(tmp_path / "run", Config(steps=3))


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
        patch.setattr(trainer.watch.time, "sleep", count)
        assert all(looks.acquire(timeout=300) for _ in range(2))


@pytest.fixture
def watching(log):
    """A thread that watches the run."""
    thread = threading.Thread(target=watch, args=(log.folder,), daemon=True)
    thread.start()
    yield thread
    thread.join(300)
    assert not thread.is_alive()


def test_lines_come_with_the_steps_and_end_with_the_run(log, capsys, watching):
    log.write({"step": 0, "eval/accuracy": 0.25})
    assert wait_for(capsys, "\n") == "0/3  accuracy 25.0%\n"
    log.write(row(1))
    log.write(row(2))
    seen = wait_for(capsys, "2/3")
    assert seen.startswith("1/3  reward 0.25  tokens/s 1,000  entropy 0.500\n2/3  reward 0.50")
    log.write(row(3, **{"eval/accuracy": 0.5}))
    watching.join(300)
    assert capsys.readouterr().out.endswith("accuracy 50.0%  entropy 0.500\n")


def test_a_run_that_goes_back_to_its_checkpoint_is_followed(log, capsys, watching):
    for step in range(3):
        log.write(row(step))
    wait_for(capsys, "2/3")
    log.rewind(1)
    assert wait_for(capsys, "\n") == "back at 1/3\n"
    log.write(row(2, **{"reward/mean": 0.75}))
    assert wait_for(capsys, "\n").startswith("2/3  reward 0.75")
    log.write(row(3))
    watching.join(300)


def test_a_torn_line_waits_and_a_null_is_no_number(log, capsys, watching, monkeypatch):
    log.write(row(1, **{"reward/mean": float("nan")}))
    assert wait_for(capsys, "\n").startswith("1/3  tokens/s 1,000")
    with log.metrics_path.open("a") as file:
        file.write('{"step": 2, "reward')
        file.flush()
        looked_twice(monkeypatch)
        assert capsys.readouterr().out == ""
        file.write('/mean": 0.5}\n')
    assert wait_for(capsys, "\n") == "2/3  reward 0.50\n"
    log.write(row(3))
    watching.join(300)


def test_a_terminal_shows_the_last_numbers_and_their_course(log, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for step in range(4):
        log.write(row(step, **({"eval/accuracy": 0.1 * step} if step % 2 else {})))
    shown = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", shown)
    watch(log.folder)
    text = shown.getvalue()
    assert "run  step 3/3  0:00:00 left  last step 0:00:00 ago" in text
    assert "reward     0.75  ▁▃▆█" in text.replace("\x1b[2K", "")
    assert "tokens/s  3,000  ▁▃▆█" in text
    assert "accuracy  30.0%  ▁█" in text
    assert "entropy   0.500  ▁▁▁▁" in text


def test_what_is_left_counts_evaluations(log):
    log.write(row(1))
    log.write(row(2, **{"time/evaluate": 4.0}))
    console = Console(file=io.StringIO(), width=100)
    rows = trainer.watch.read_rows(log.metrics_path)
    console.print(trainer.watch._screen(log.folder, rows, 12))
    assert "step 2/12  0:00:40 left" in console.file.getvalue()
    console.print(trainer.watch._screen(log.folder, [], 12))
    assert "no step yet" in console.file.getvalue()


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
    assert "is not the folder of a run" in capsys.readouterr().err

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.watch, "watch", interrupt)
    assert main(["watch", str(log.folder)]) == 0
    assert capsys.readouterr().err == ""
