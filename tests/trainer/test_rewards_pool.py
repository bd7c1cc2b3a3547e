"""Processes that score answers: what hangs or crashes costs one answer, and no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.verifiers import OTHERS
from trainer.rewards.pool import Pool

NAME = "tests.trainer.verifiers:scripted"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROGRAM = """
import sys
from tests.trainer.verifiers import OTHERS
from trainer.rewards.pool import Pool
pool = Pool("{name}", 2, {seconds}, 4.0)
requests = [dict(prompt=sys.argv[1], response=r, answer=None) for r in ("slow", {response!r})]
pool.run([requests[0]] * 4)
print("ready", flush=True)
pool.run(requests)
"""


def pool(workers: int = 2, seconds: float = 100.0, gigabytes: float = 4.0) -> Pool:
    """A pool whose limit only an answer that hangs reaches, however slow the machine is."""
    return Pool(NAME, workers, seconds, gigabytes)


def ask(asked: Pool, *responses: str, folder: Path | str = ""):
    return asked.run(
        [{"prompt": str(folder), "response": response, "answer": None} for response in responses]
    )


def alive(pid: int) -> bool:
    """Whether `pid` runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pids(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def wait_for(condition: Callable[[], bool], problem: str) -> None:
    """Until it holds; five minutes are far more than any machine takes."""
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit, problem
        time.sleep(0.02)


def wait_for_end(folder: Path) -> None:
    """Until no process of `folder` lives."""
    wait_for(lambda: not any(map(alive, pids(folder))), "a process is left")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_answer_costs_itself_alone(workers):
    asked = pool(workers, seconds=4.0)
    bad = ["hang", "segfault", "exit", "hang in C", "sys.exit", "raise", "memory"]
    responses = [text for i, name in enumerate(bad) for text in (str(i), name, str(i + 0.5))]
    outcomes = ask(asked, *responses, "slow", "true")
    failures = dict(zip(responses, (one.failure for one in outcomes), strict=False))
    assert [outcome.reward for outcome in outcomes] == [
        *(x for i in range(len(bad)) for x in (i, 0.0, i + 0.5)),
        *(1.0, 1.0),
    ]
    assert {name: failures[name] for name in bad} == {
        name: "timeout" if "hang" in name else "crash" for name in bad
    }
    assert sum(outcome.failure != "" for outcome in outcomes) == len(bad)
    messages = {outcome.message for outcome in outcomes}
    assert any("RuntimeError: of no use" in message for message in messages)
    assert any(message.endswith(f"status {-signal.SIGSEGV}") for message in messages)
    assert any("MemoryError" in message for message in messages)
    asked.close()


def test_order_and_processes_are_kept(tmp_path):
    """More answers than processes, slow ones among them; the next call starts no process."""
    asked = pool(2)
    responses = ["slow", *map(str, range(2, 40)), "slow"]
    outcomes = ask(asked, *responses, folder=tmp_path)
    assert [outcome.reward for outcome in outcomes] == [1, *range(2, 40), 1]
    assert len(pids(tmp_path)) == 2
    assert ask(asked) == []
    assert ask(asked, "7", "8", folder=tmp_path)[1].reward == 8
    assert len(pids(tmp_path)) == 2
    asked.close()


@LINUX
def test_no_more_processes_than_answers(tmp_path):
    asked = pool(8)
    ask(asked, "1", folder=tmp_path)
    assert len(pids(tmp_path)) == 1
    asked.close()
    assert not any(map(alive, pids(tmp_path)))


@LINUX
def test_a_process_that_died_idle_is_replaced(tmp_path):
    asked = pool(1)
    ask(asked, "1", folder=tmp_path)
    (first,) = pids(tmp_path)
    os.kill(first, signal.SIGKILL)
    wait_for_end(tmp_path)
    assert [outcome.failure for outcome in ask(asked, "2", "3", folder=tmp_path)] == ["", ""]
    assert len(pids(tmp_path)) == 2
    asked.close()


@LINUX
def test_a_process_without_memory_is_replaced(tmp_path):
    """What it holds may be of earlier answers, and would fail later ones too."""
    asked = pool(1)
    failures = [
        one.failure for one in ask(asked, "1", "memory", "2", "raise", "3", folder=tmp_path)
    ]
    assert failures == ["", "crash", "", "crash", ""]
    assert len(pids(tmp_path)) == 2
    asked.close()


@LINUX
def test_a_timeout_ends_what_the_verifier_started_too(tmp_path):
    asked = pool(1, seconds=2.0)
    assert ask(asked, "hang with a child", folder=tmp_path)[0].failure == "timeout"
    assert len(pids(tmp_path)) == 2
    wait_for_end(tmp_path)


def test_output_of_a_verifier_is_no_answer(capfd):
    assert ask(pool(1), "print")[0].reward == 1.0
    assert capfd.readouterr().out == "from a verifier\n"


def test_what_is_no_verdict_is_an_error_that_names_the_answer():
    asked = pool(2)
    for name in sorted(OTHERS.keys() - {"true"}):
        shown = re.escape(repr(OTHERS[name]))
        message = rf"scripted must return a number, .*; got {shown}, a \w+ for the prompt '', "
        with pytest.raises(ValueError, match=rf"{message}response '{name}'"):
            ask(asked, "1", name, "2")
    assert ask(asked, "3")[0].reward == 3.0
    asked.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nocolon", "a verifier is named \"module:function\"; got 'nocolon'"),
        ("tests.trainer.verifiers:", 'a verifier is named "module:function"'),
        ("no.such.module:f", "cannot import no.such.module: ModuleNotFoundError: No module named"),
        ("tests.trainer.verifiers:missing", r"tests/trainer/verifiers\.py has no 'missing'"),
        ("tests.trainer.verifiers:NOT_CALLABLE", "a int is not callable"),
        ("tests.trainer.verifiers:of_two", r"response: str\) -> float cannot be called with .*'an"),
        ("divides_by_zero:f", "cannot import divides_by_zero: ZeroDivisionError: division by zero"),
        ("ends_itself:f", "the process of ends_itself:f ended with status 3 while"),
    ],
)
def test_functions_that_cannot_be_used_are_named_at_the_start(name, message, tmp_path, monkeypatch):
    (tmp_path / "ends_itself.py").write_text("import os; os._exit(3)")
    (tmp_path / "divides_by_zero.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        Pool(name, 1, 1.0, 4.0).start()


def program(folder: Path, response: str, seconds: float) -> subprocess.Popen:
    """A trainer of its own that verifies `response`, and another process that is idle."""
    text = PROGRAM.format(name=NAME, seconds=seconds, response=response)
    started = subprocess.Popen(
        [sys.executable, "-c", text, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    wait_for(
        lambda: response in (path.read_text() for path in folder.iterdir()),
        "the answer is not worked on",
    )
    assert len([pid for pid in pids(folder) if alive(pid)]) == 2
    return started


@LINUX
@pytest.mark.parametrize("response", ["hang", "hang in C"])
def test_kill_9_of_the_trainer_leaves_no_process(response, tmp_path):
    with program(tmp_path, response, seconds=2.0) as trainer:
        trainer.kill()
        trainer.wait()
    wait_for_end(tmp_path)


@LINUX
def test_an_interrupted_trainer_leaves_no_process(tmp_path):
    with program(tmp_path, "hang in C", seconds=600.0) as trainer:
        trainer.send_signal(signal.SIGINT)
        _, errors = trainer.communicate(timeout=300)
    assert "KeyboardInterrupt" in errors
    wait_for_end(tmp_path)
