"""Answers about kernels outlive their process; nothing that happens to their files is an error."""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from entropy_kernels.verification import machine, record
from entropy_kernels.verification.record import DIED, Answer, Record

pytest.importorskip("triton")

ABOUT = {"gpu": "A GPU", "driver": "1", "kernels": "abc"}
RIGHT, WRONG = Answer(True), Answer(False, "off by 1")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EK_CACHE_DIR", str(tmp_path / "cache"))
    record._told.clear()
    return tmp_path / "cache"


def test_answers_are_read_again_and_replaced():
    ours = Record(ABOUT)
    assert ours.read() == {}
    ours.write("forward one", RIGHT)
    ours.write("dlogits two", WRONG)
    assert Record(ABOUT).read() == {"forward one": RIGHT, "dlogits two": WRONG}
    ours.write("dlogits two", RIGHT)
    assert Record(ABOUT).read() == {"forward one": RIGHT, "dlogits two": RIGHT}
    assert json.loads((ours.folder / "machine.json").read_text()) == ABOUT


@pytest.mark.parametrize("name", ABOUT)
def test_another_machine_has_other_answers(name):
    Record(ABOUT).write("forward one", RIGHT)
    assert Record(ABOUT | {name: "other"}).read() == {}


def test_a_machine_is_all_that_decides(monkeypatch):
    here = machine.machine(torch.device("cpu"))
    assert set(here) == {"gpu", "architecture", "driver", "torch", "triton", "cuda", "kernels"}
    assert all(isinstance(x, str) and x for x in here.values())


def test_a_driver_is_asked_for_where_no_file_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_DRIVERS", (str(tmp_path / "missing"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._driver.__wrapped__() == "unknown"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 999.1\necho 999.1\n")
    program.chmod(0o755)
    assert machine._driver.__wrapped__() == "999.1"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine._driver.__wrapped__() == "unknown"


def test_triton_may_be_installed_under_another_name(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert machine.machine(torch.device("cpu"))["triton"]


def test_the_digest_is_of_the_kernels(tmp_path, monkeypatch):
    (tmp_path / "_triton" / "common").mkdir(parents=True)
    file = tmp_path / "_triton" / "common" / "tiles.py"
    file.write_text("one")
    monkeypatch.setattr(machine, "_PACKAGE", tmp_path)
    before = machine.sources.__wrapped__()
    file.write_text("two")
    assert machine.sources.__wrapped__() != before


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"EK_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"EK_CACHE_DIR": "~/own", "HOME": "/home/me"}, "/home/me/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/entropy_kernels"),
        ({"HOME": "/home/me"}, "/home/me/.cache/entropy_kernels"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, wanted):
    for name in ("EK_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(record.cache_folder()) == wanted


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    for name in ("EK_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert record.cache_folder() == Path(tempfile.gettempdir()) / "entropy_kernels"


@pytest.mark.parametrize(
    "contents", [b"{", b"", b"\xff\xfe", b"[1]", b'{"question": 3}', b"[" * 99999]
)
def test_a_damaged_file_is_told_once_and_costs_one_answer(contents):
    ours = Record(ABOUT)
    ours.write("forward one", RIGHT)
    ours.write("dlogits two", WRONG)
    [path] = ours.folder.glob("forward*.json")
    path.write_bytes(contents)
    with pytest.warns(RuntimeWarning) as told:
        assert [Record(ABOUT).read() for _ in range(2)] == [{"dlogits two": WRONG}] * 2
    assert [path.name in str(x.message) for x in told] == [True]
    ours.write("forward one", RIGHT)
    assert Record(ABOUT).read()["forward one"] == RIGHT


def test_a_folder_that_cannot_be_written_is_told_once(folder):
    folder.write_text("a file where the folder should be")
    ours = Record(ABOUT)

    def use():
        with ours.started("forward one"):
            ours.write("forward one", RIGHT)
        return ours.read()

    with pytest.warns(RuntimeWarning, match="does not keep the checks") as told:
        assert [use(), use()] == [{}, {}]
    assert len(told) == 1


def test_a_disk_that_fills_leaves_no_half_file(monkeypatch):
    ours = Record(ABOUT)
    ours.write("forward one", RIGHT)

    def full(contents, file, indent):
        file.write('{"question": "forw')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.json, "dump", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        ours.write("forward one", WRONG)
    assert Record(ABOUT).read() == {"forward one": RIGHT}
    assert not list(ours.folder.glob("*.new"))


def _write_many(number):
    ours = Record(ABOUT)
    for i in range(40):
        with ours.started(f"forward {i}"):
            ours.write(f"forward {i}", Answer(False, f"process {number} " + "x" * 5000))
    return ours.read()


def test_two_processes_write_at_once():
    with multiprocessing.get_context("fork").Pool(2) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pool.map(_write_many, range(2), chunksize=1)
    assert all(len(answers) == 40 for answers in found)
    final = Record(ABOUT).read()
    assert {x.reason[:9] for x in final.values()} <= {"process 0", "process 1"}
    assert not list(Record(ABOUT).folder.glob("*.started"))


CHECK = """
import os, signal, sys, time
from entropy_kernels.verification.record import Record
with Record({"gpu": "A GPU", "driver": "1", "kernels": "abc"}).started("forward one"):
    print("started", flush=True)
    if sys.argv[1] == "dies":
        os._exit(1)
    time.sleep(60)
"""


@pytest.fixture
def checking():
    """A process that is within a check, or has died there."""
    processes = []

    def start(how):
        command = [sys.executable, "-c", CHECK, how]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "started\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def die(*processes):
    for process in processes:
        process.kill()
        process.wait()


TWICE = {"forward one": Answer(False, DIED)}


def test_a_second_death_in_a_check_is_an_answer(checking):
    process = checking("dies")
    deadline = time.monotonic() + 100
    while Record(ABOUT)._deaths("*") == {} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Record(ABOUT)._deaths("*") == {"forward one": 1}, "a zombie is dead"
    process.wait()
    assert Record(ABOUT).read() == {}, "it may have been a scheduler's signal"
    die(checking("lives"))
    assert Record(ABOUT).read() == TWICE
    assert "--verify, or EK_VERIFY=force, checks it again" in DIED
    with Record(ABOUT).started("forward one"):
        Record(ABOUT).write("forward one", RIGHT)
    assert Record(ABOUT).read() == {"forward one": RIGHT}
    assert not list(Record(ABOUT).folder.glob("*.started"))


@pytest.mark.slow
def test_ranks_that_end_together_are_one_death(checking):
    die(*[checking("lives") for _ in range(3)])
    assert Record(ABOUT).read() == {}
    die(*[checking("lives") for _ in range(2)])
    assert Record(ABOUT).read() == TWICE


@pytest.mark.slow
def test_deaths_count_after_an_answer(checking):
    """As where the check is forced. A reason that is known stays."""
    ours = Record(ABOUT)
    ours.write("forward one", RIGHT)
    die(checking("lives"))
    assert ours.read() == {"forward one": RIGHT}
    die(checking("lives"))
    assert ours.read() == TWICE
    ours.write("forward one", RIGHT)
    assert ours.read() == {"forward one": RIGHT}
    ours.write("forward one", WRONG)
    die(checking("lives"))
    die(checking("lives"))
    assert ours.read() == {"forward one": WRONG}


def test_a_process_that_still_checks_is_no_death(checking):
    process = checking("lives")
    assert Record(ABOUT)._deaths("*") == {}
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not list(Record(ABOUT).folder.glob("*.started")), "an interrupt clears the mark"
    with Record(ABOUT).started("forward one"):
        assert Record(ABOUT)._deaths("*") == {}, "nor in this process"


def test_no_number_of_a_process_decides(checking):
    """Containers may share a name and a folder, and count their processes apart."""
    checking("lives")
    [mark] = Record(ABOUT).folder.glob("*.started")
    assert set(json.loads(mark.read_text())) == {"question", "host", "deaths"}
    copy = mark.with_name(mark.name.replace(".started", "0.started"))
    copy.write_text(mark.read_text())
    assert Record(ABOUT)._deaths("*") == {"forward one": 1}, "nobody holds the copy"


@pytest.mark.parametrize("age", [10, record.OLD + 10])
@pytest.mark.parametrize("why", ["another host", "no locks", "no locks here"])
def test_a_mark_without_a_lock_is_a_death_once_it_is_old(monkeypatch, age, why):
    def refuse(file, how):
        raise OSError(95, "Operation not supported")

    if why == "no locks":
        monkeypatch.setattr(record.fcntl, "flock", refuse)
    if why == "no locks here":
        monkeypatch.setattr(record, "fcntl", None)
    ours = Record(ABOUT)
    with ours.started("forward one"):
        if why == "another host":
            monkeypatch.setattr(record.socket, "gethostname", lambda: why)
        [mark] = ours.folder.glob("*.started")
        os.utime(mark, (time.time() - age, time.time() - age))
        assert ours._deaths("*") == ({"forward one": 1} if age > record.OLD else {})
    assert not list(ours.folder.glob("*.started"))


def test_a_check_that_ends_while_it_is_looked_at_is_no_death(monkeypatch):
    ours, flock = Record(ABOUT), record.fcntl.flock
    with contextlib.ExitStack() as check:
        check.enter_context(ours.started("forward one"))

        def ends_first(file, how):
            check.close()
            flock(file, how)

        monkeypatch.setattr(record.fcntl, "flock", ends_first)
        assert ours._deaths("*") == {}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(mask):
    before, ours = os.umask(mask), Record(ABOUT)
    try:
        ours.write("forward one", RIGHT)
    finally:
        os.umask(before)
    assert {x.stat().st_mode & 0o777 for x in ours.folder.iterdir()} == {0o666 & ~mask}


def test_an_answer_that_may_not_be_read_is_unreadable(monkeypatch):
    ours = Record(ABOUT)
    ours.write("forward one", RIGHT)

    def refuse(path, encoding):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(RuntimeWarning, match="is unreadable") as told:
        assert [ours.read(), ours.read()] == [{}, {}]
    assert len(told) == 1


def test_a_relative_folder_is_that_of_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("EK_CACHE_DIR", "cache")
    monkeypatch.chdir(tmp_path)
    ours = Record(ABOUT)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    ours.write("forward one", RIGHT)
    assert ours.read() == {"forward one": RIGHT}
    assert ours.folder.parent == tmp_path / "cache"
