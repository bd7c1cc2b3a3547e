"""One owner of a folder: who is kept out, what the line says, and what frees it."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import datasets
import psutil
import pytest

import trainer.launch.lock
import trainer.run
from tests.processes import forkserver
from tests.trainer.analyze_cases import options
from tests.trainer.small import Even, on_even, save_folder, settings, use_task  # noqa: F401
from tests.trainer.worlds import run_ranks
from trainer.__main__ import main
from trainer.checkpoint.export import export
from trainer.evaluation.command import Evaluation, evaluate_model
from trainer.launch.lock import owned
from trainer.ranks import join
from trainer.studies.analyze.evolution import Evolution, analyze_evolution
from trainer.studies.analyze.patterns import Patterns, analyze_patterns
from trainer.studies.analyze.temperatures import Temperatures, analyze_temperatures
from trainer.studies.compare import Comparison, compare
from trainer.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_folder(tmp_path_factory.mktemp("model"), spread=0.4)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The folder of a run of two steps, and its settings."""
    config = settings(tmp_path_factory.mktemp("runs"), model, steps=2)
    train(config)
    return Path(config.root) / "run", config


def hold(folder, beside, ready, children):
    """Own `folder` with a child of each kind, until killed."""
    with owned(folder, beside=beside):
        if children:
            forked = os.fork()
            if not forked:
                signal.pause()
            started = subprocess.Popen(["sleep", "600"], close_fds=False)
            (folder / "children").write_text(f"{forked} {started.pid}")
        ready.set()
        signal.pause()


@contextlib.contextmanager
def held(folder, beside=False, children=False):
    """`folder` is owned by another process."""
    ready = forkserver().Event()
    process = forkserver().Process(target=hold, args=(folder, beside, ready, children))
    process.start()
    try:
        assert ready.wait(300)
        yield process
    finally:
        process.kill()
        process.join()


def test_the_line_names_who_has_the_folder(tmp_path):
    with held(tmp_path) as process:
        with pytest.raises(ValueError, match="is in use") as caught, owned(tmp_path):
            pass
        said = str(caught.value)
        assert said.startswith(f"{tmp_path} is in use by process {process.pid} on ")
        assert f" on {socket.gethostname()} since {time.localtime().tm_year}-" in said
        assert ": python" in said
        assert said.endswith("Wait for its end, end it, or choose another folder")
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid


def test_one_process_does_not_own_a_folder_twice(tmp_path):
    one, other = tmp_path / "x", tmp_path / "y"
    link = tmp_path / "link"
    with owned(one), owned(other), owned(one, beside=True):
        link.symlink_to(one)
        for path in (one, link):
            with pytest.raises(ValueError, match="is in use by this process"), owned(path):
                pass
        with pytest.raises(ValueError, match="x is in use by this"), owned(one, beside=True):
            pass
    with owned(one):
        pass
    # Nothing is left of the locks, nor of folders that had nothing else in them.
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_folder_that_was_there_stays_and_what_was_written_too(tmp_path):
    (tmp_path / "empty").mkdir()
    with owned(tmp_path / "empty"):
        pass
    with owned(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "empty", "file"]


def test_kill_9_frees_the_folder_though_children_live(tmp_path):
    with held(tmp_path, children=True) as process:
        children = list(map(int, (tmp_path / "children").read_text().split()))
        process.kill()
        process.join()
        try:
            assert all(psutil.Process(child).is_running() for child in children)
            assert (tmp_path / ".lock").exists()
            with owned(tmp_path):
                pass
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_who_waits_for_a_lock_that_is_removed_takes_the_new_one(tmp_path, monkeypatch):
    """Opened before the owner removed it, and locked after: a lock on a file without a name."""
    opened, file = os.open, tmp_path / ".lock"

    def late(path, *arguments):
        descriptor = opened(path, *arguments)
        if path == file and not stale:
            stale.append(descriptor)
            file.unlink()
        return descriptor

    stale: list[int] = []
    monkeypatch.setattr(os, "open", late)
    with owned(tmp_path):
        assert stale
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_it_warns_and_goes_on(tmp_path, monkeypatch, capsys, code):
    def lockf(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(trainer.launch.lock.fcntl, "lockf", lockf)
    with owned(tmp_path), owned(tmp_path):
        pass
    assert capsys.readouterr().err.count(f"{tmp_path} cannot be locked") == 2


def test_other_errors_of_a_lock_are_raised_with_its_name(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(trainer.launch.lock.fcntl, "lockf", lockf)
    with pytest.raises(OSError, match=r"Input/output error: .*/\.lock'"), owned(tmp_path):
        pass


def test_folders_that_were_made_for_a_lock_that_fails_are_removed(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space left"), owned(tmp_path / "x" / "y"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "none" / "lock")
    with pytest.raises(OSError, match=r"symbolic links: .*/\.lock'"), owned(tmp_path):
        pass


# Every command that writes a folder.


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_of_a_run_is_refused_and_the_first_unharmed(run, capsys):
    folder, config = run
    with held(folder):
        before = files(folder)
        command = ["train", "--root", config.root, "--name", "run", "--model.path"]
        assert main([*command, config.model.path, "--steps", "9", "--warm-start.steps", "0"]) == 1
        assert files(folder) == before
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"error: {folder} is in use by process ")
    assert said.out == ""


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        (Evaluation, evaluate_model),
        (Patterns, analyze_patterns),
        (Temperatures, analyze_temperatures),
        (Evolution, analyze_evolution),
    ],
)
def test_evaluations_and_analyses_own_where_they_write(run, tmp_path, monkeypatch, kind, work):
    """The folder of a run that is trained in, too; its model may be read meanwhile."""
    folder, config = run
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1 + 6 =", "answer": "7"}\n')
    wanted = kind(config.model.path, **options(f"file:{data}", folder))
    if kind is Evolution:
        wanted = replace(wanted, checkpoints=(config.model.path, config.model.path))
    with held(folder):
        before = files(folder)
        with pytest.raises(ValueError, match="is in use by process"):
            work(wanted)
        assert files(folder) == before
        if kind is Evaluation:
            work(replace(wanted, model=str(folder), out=str(tmp_path / "out")))
            assert (tmp_path / "out" / "results.json").exists()


def test_an_export_owns_what_it_writes(run, tmp_path):
    folder, _ = run
    out = tmp_path / "model"
    with held(out, beside=True), pytest.raises(ValueError, match="model is in use by process"):
        export(folder, out)
    with held(folder):  # A run is read while it goes on.
        export(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_comparison_owns_its_folder_and_its_results(tmp_path):
    """And leaves those of its runs to the runs: one that is trained by hand fails with a line."""
    wanted = Comparison(arms=("all",), seeds=1, label="x", config=settings(tmp_path, steps=1))
    with held(tmp_path / "x"), pytest.raises(ValueError, match="x is in use by process"):
        compare(wanted)
    out = tmp_path / "elsewhere" / "results.json"
    with held(out, beside=True), pytest.raises(ValueError, match=r"results\.json is in use by"):
        compare(replace(wanted, out=str(out)))


def test_a_run_of_a_comparison_that_is_trained_by_hand(tmp_path, capsys):
    wanted = Comparison(arms=("all",), seeds=1, label="x", config=settings(tmp_path, steps=1))
    with held(tmp_path / "x" / "all" / "seed-0"):
        assert compare(wanted) == 1
    said = capsys.readouterr().err
    assert "x/all/seed-0 failed:\nerror: " in said
    assert "seed-0 is in use by process" in said


def ranks_own(folder):
    """What each of two ranks gets: whether the folder is owned, or the error."""
    with join("cpu") as ranks:
        try:
            with owned(folder, ranks):
                # Nobody leaves, and gives it back, before all have looked.
                return ranks.gather((folder / ".lock").exists())[ranks.rank]
        except ValueError as error:
            return str(error), error.teller


def test_several_ranks_have_one_owner(tmp_path):
    folder = tmp_path / "folder"
    assert run_ranks(2, ranks_own, tmp_path / "free", folder) == [True, True]
    with held(folder):
        one, other = run_ranks(2, ranks_own, tmp_path / "busy", folder)
    assert one == other
    assert one[0].startswith(f"{folder} is in use by process ")
    assert one[1] == 0  # The first rank prints it, and no other.
