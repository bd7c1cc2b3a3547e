"""A new run from a checkpoint of another: what it begins with, notes, and leaves alone."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.processes import forkserver, kill_after
from tests.trainer.small import Even, metrics, on_even, save_folder, settings, use_task  # noqa: F401
from tests.trainer.test_train import assert_same_run
from tests.trainer.worlds import next_world, run_ranks
from trainer import checkpoint
from trainer.__main__ import main
from trainer.checkpoint import branch
from trainer.checkpoint.sharded import read_whole
from trainer.config.files import fill
from trainer.launch.command_line import parse_train
from trainer.log import read_rows
from trainer.report.page import write_report
from trainer.report.watch import watch
from trainer.train import train


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A finished run of six steps with checkpoints 2, 4 and 6, and its settings."""
    model = save_folder(tmp_path_factory.mktemp("model"), spread=0.2)
    config = settings(tmp_path_factory.mktemp("parent"), model, keep_checkpoints=3)
    train(config)
    return Path(config.root) / "run", config


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def new(config, root, **changes):
    return dataclasses.replace(config, root=str(root), name="new", **changes)


def test_with_the_same_settings_it_is_the_same_run(parent, tmp_path, capsys):
    folder, config = parent
    before = contents(folder)
    train(new(config, tmp_path), branch=f"{folder}@2")
    assert_same_run(tmp_path / "new", folder)
    run = json.loads((tmp_path / "new" / "run.json").read_text())
    assert run["origin"] == {"run": str(folder.resolve()), "name": "run", "step": 2, "starts": 1}
    assert [start["step"] for start in run["starts"]] == [0, 2]
    assert run["starts"][1]["changes"].keys() == {"name", "root"}
    assert "changed  name was run, now new\n" in capsys.readouterr().out
    write_report(tmp_path / "new")
    watch(tmp_path / "new")
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert contents(folder) == before


def test_any_setting_may_be_another(parent, tmp_path, capsys):
    """Up to the checkpoint all is the other run's; weights and moments are its too."""
    folder, config = parent
    changes = {"seed": 9, "algorithm.fraction": 0.5, "optimizer.learning_rate": 1e-3}
    changes["rollout.group_size"] = 3
    config = fill(new(config, tmp_path, steps=7, keep_checkpoints=9), changes)
    train(config, branch=str(folder / "checkpoints" / "step-000004"))
    rows, before = metrics(tmp_path / "new"), metrics(folder)
    assert [row["step"] for row in rows] == list(range(8))
    assert rows[:5] == before[:5]
    assert rows[5] != before[5]
    assert rows[7]["lr"] == 1e-3
    got, want = (f / "checkpoints" / "step-000004" for f in (tmp_path / "new", folder))
    for part in ("", "optimizer"):
        found, wanted = read_whole(got / part), read_whole(want / part)
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    samples = read_rows(tmp_path / "new" / "samples.jsonl")
    assert sorted({row["step"] for row in samples}) == [1, 2, 4, 6, 7]
    start = json.loads((tmp_path / "new" / "run.json").read_text())["starts"][-1]
    assert start["changes"]["seed"] == [3, 9]
    assert start["changes"].keys() > changes.keys()
    capsys.readouterr()
    # The same command goes on, and from then on the branch keeps what it is.
    train(dataclasses.replace(config, steps=8), branch=str(folder / "checkpoints" / "step-000004"))
    assert "changed  steps was 7, now 8\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings: seed was 9, now 10"):
        train(dataclasses.replace(config, seed=10), branch=f"{folder}@4")


def test_a_branch_of_a_branch(parent, tmp_path):
    folder, config = parent
    train(new(config, tmp_path, steps=5), branch=f"{folder}@4")
    train(dataclasses.replace(new(config, tmp_path), name="newer"), branch=str(tmp_path / "new"))
    run = json.loads((tmp_path / "newer" / "run.json").read_text())
    assert (run["origin"]["step"], run["origin"]["origin"]["step"]) == (5, 4)
    assert run["origin"]["starts"] == 2
    assert metrics(tmp_path / "newer")[6] == metrics(folder)[6]


def test_the_command_takes_the_other_runs_settings(parent, tmp_path, monkeypatch, capsys):
    folder, config = parent
    asked = parse_train(["--branch", f"{folder}@2", "--name", "new", "--steps", "3"])
    assert asked.config == dataclasses.replace(config, name="new", steps=3)
    assert parse_train(["tiny", f"--branch={folder}@2"]).config.seed == 0
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--branch", f"{folder}@2", "--name=new", "--root=.", "--steps=3"]
    assert main(arguments) == 0
    assert [row["step"] for row in metrics(tmp_path / "new")] == [0, 1, 2, 3]
    assert main(["train", "--branch", f"{folder}@2"]) == 1
    assert f"error: {folder} holds another run; choose another --name" in capsys.readouterr().err


def test_what_cannot_be_branched_is_refused(parent, tmp_path):
    folder, config = parent
    config = new(config, tmp_path)
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    (cut / "run.json").write_bytes((folder / "run.json").read_bytes())
    cases = [
        (f"{folder}@3", "has no checkpoint of step 3; it has 2, 4, 6"),
        (str(tmp_path), "run.json is missing: no run to branch from"),
        (f"{folder}@last", "run.json is missing"),
        (str(cut), "cut has no checkpoint$"),
        (str(folder), "steps must be more than the 6 of .*step-000006; got 6"),
    ]
    for text, says in cases:
        with pytest.raises(ValueError, match=says):
            train(config, branch=text)
    (cut / "checkpoints" / "step-000004").mkdir()
    with pytest.raises(ValueError, match=r"step-000004/manifest.json cannot be read"):
        train(config, branch=f"{cut}@4")
    assert not (tmp_path / "new").exists()
    train(config, branch=f"{folder}@4")
    with pytest.raises(ValueError, match="new is a branch from step 4, not 2; choose another"):
        train(config, branch=f"{folder}@2")
    with pytest.raises(ValueError, match="run holds another run; choose another --name"):
        train(dataclasses.replace(config, root=str(folder.parent), name="run"), branch=str(folder))


def test_the_other_runs_files_are_its_own(parent, tmp_path, monkeypatch):
    """Each deletes its checkpoints without the other's; without links they are copies."""
    folder, config = parent
    before = contents(folder)
    train(new(config, tmp_path, keep_checkpoints=1, steps=6), branch=f"{folder}@2")
    assert checkpoint.steps_of(tmp_path / "new").keys() == {6}

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    train(new(config, tmp_path / "b"), branch=f"{folder}@2")
    assert_same_run(tmp_path / "b" / "new", folder)
    assert contents(folder) == before


def test_a_checkpoint_that_its_run_deletes_meanwhile(parent, tmp_path, monkeypatch):
    """Which leaves a folder that another step may still have."""
    folder, config = parent
    live = shutil.copytree(folder, tmp_path / "live")
    link = os.link

    def deleted(path, to):
        path.unlink()
        link(path, to)

    monkeypatch.setattr(os, "link", deleted)
    with pytest.raises(
        ValueError, match=r"step-000002 was deleted meanwhile: .*; give another step"
    ):
        train(new(config, tmp_path), branch=f"{live}@2")
    monkeypatch.undo()
    train(new(config, tmp_path), branch=f"{live}@4")
    assert_same_run(tmp_path / "new", folder)


def doomed(config, source, operations):
    """A branch that is killed after so many operations on files."""
    lay_out = branch._lay_out

    def counted(*arguments):
        kill_after(operations)
        lay_out(*arguments)

    branch._lay_out = counted
    use_task(Even())
    train(config, branch=source)


def test_kill_9_while_it_is_laid_out(parent, tmp_path):
    """At some of its operations on files: the same command makes it whole, and no other starts."""
    folder, config = parent
    processes = forkserver()
    # Between the files, before and after run.json, in the links, before and after the last rename.
    for operations in (2, 8, 10, 22, 49, 50):
        root = tmp_path / str(operations)
        root.mkdir()
        branching = new(config, root)
        process = processes.Process(target=doomed, args=(branching, f"{folder}@2", operations))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert (root / "new" / "run.json").exists() == (operations >= 10)
        assert bool(checkpoint.steps_of(root / "new")) == (operations == 50)
        if operations >= 10:
            assert [row["step"] for row in metrics(root / "new")] == [0, 1, 2]
        if operations in (10, 22, 49):
            with pytest.raises(
                ValueError, match=r"without its checkpoint: give --branch \S+@2 again"
            ):
                train(branching)
        train(branching, branch=f"{folder}@2")
        assert_same_run(root / "new", folder)


def on_two(config, source):
    """Branches, then is refused, then allowed; the error of each rank."""
    use_task(Even())
    train(config, branch=source)
    next_world()
    other = dataclasses.replace(config, seed=9, steps=6)
    try:
        train(other)
    except ValueError as error:
        said = str(error)
    next_world()
    train(other, allow_changes=["seed"])
    return said


def test_two_ranks_branch_and_change_together(parent, tmp_path):
    """All refuse what one refuses; the first alone writes what has changed."""
    folder, config = parent
    config = fill(new(config, tmp_path, steps=4), {"model.compute_dtype": "float32"})
    errors = run_ranks(2, on_two, tmp_path / "ranks", config, f"{folder}@2")
    assert errors[0] == errors[1]
    assert "other settings: seed was 3, now 9. " in errors[0]
    starts = json.loads((tmp_path / "new" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2, 4]
    assert starts[1]["changes"].keys() == {"name", "root", "steps", "model.compute_dtype"}
    assert starts[2]["changes"].keys() == {"seed", "steps"}
    assert [row["step"] for row in metrics(tmp_path / "new")] == list(range(7))
    got, want = metrics(tmp_path / "new")[3:5], metrics(folder)[3:5]
    assert [row["tokens"] for row in got] == [row["tokens"] for row in want]
