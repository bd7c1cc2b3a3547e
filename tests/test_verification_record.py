"""Answers about kernels outlive their process; nothing that happens to their files is an error."""

import importlib.metadata
import json
import multiprocessing
import os
import signal
import socket
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


def test_triton_may_be_installed_under_another_name(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert machine.machine(torch.device("cpu"))["triton"]


def test_a_mark_with_a_number_that_no_process_has_is_a_dead_one_s():
    ours = Record(ABOUT)
    ours.write("forward one", RIGHT)
    mark = {"question": "dlogits two", "host": socket.gethostname(), "pid": 1 << 70}
    (ours.folder / "dlogits.started").write_text(json.dumps(mark))
    assert ours.read() == {"forward one": RIGHT, "dlogits two": Answer(False, DIED)}


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


def test_a_process_that_died_in_a_check_is_an_answer(checking):
    process = checking("dies")
    deadline = time.monotonic() + 10
    while Record(ABOUT).read() == {} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Record(ABOUT).read() == {"forward one": Answer(False, DIED)}, "a zombie is dead"
    process.wait()
    assert Record(ABOUT).read() == {"forward one": Answer(False, DIED)}
    Record(ABOUT).write("forward one", RIGHT)
    assert Record(ABOUT).read() == {"forward one": RIGHT}
    assert not list(Record(ABOUT).folder.glob("*.started"))


def test_a_process_that_still_checks_is_none(checking):
    process = checking("lives")
    assert Record(ABOUT).read() == {}
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not list(Record(ABOUT).folder.glob("*.started")), "an interrupt clears the mark"
    process = checking("lives")
    process.kill()
    process.wait()
    assert Record(ABOUT).read() == {"forward one": Answer(False, DIED)}


@pytest.mark.parametrize(("age", "died"), [(10, False), (record.OLD + 10, True)])
def test_the_mark_of_another_host_counts_once_it_is_old(monkeypatch, age, died):
    ours = Record(ABOUT)
    with ours.started("forward one"):
        monkeypatch.setattr(record.socket, "gethostname", lambda: "another host")
        [mark] = ours.folder.glob("*.started")
        os.utime(mark, (time.time() - age, time.time() - age))
        assert ours.read() == ({"forward one": Answer(False, DIED)} if died else {})


def test_the_number_of_a_dead_process_may_be_anothers(monkeypatch):
    ours = Record(ABOUT)
    with ours.started("forward one"):
        assert ours.read() == {}
        monkeypatch.setattr(record, "_born", lambda pid: "later")
        assert ours.read() == {"forward one": Answer(False, DIED)}
