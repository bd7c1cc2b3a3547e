"""The whole loop: what a step does, and that a stopped run ends as one that was not."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import trainer.run
from tests.processes import forkserver, kill_after
from tests.trainer.small import Even, elsewhere, metrics, on_even, save_folder, settings, use_task  # noqa: F401
from trainer.__main__ import main
from trainer.checkpoint.sharded import read_whole
from trainer.config import Algorithm, Eval, Model
from trainer.log import read_rows
from trainer.presets import PRESETS
from trainer.train import train

ROOT = Path(__file__).parents[2]
LONG, KILLS = 30, 8  # steps of a run that is killed on the way
OPERATIONS = 77  # on files that a checkpoint takes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Makes processes quickly: forked from one that has imported everything."""
    return forkserver()


def assert_same_run(got, want):
    """Metrics, samples, weights and optimizer to the bit."""
    assert metrics(got) == metrics(want)
    assert (got / "samples.jsonl").read_bytes() == (want / "samples.jsonl").read_bytes()
    last = Path("checkpoints", sorted((want / "checkpoints").glob("step-*"))[-1].name)
    assert (got / last / "state.json").read_bytes() == (want / last / "state.json").read_bytes()
    for part in (last, last / "optimizer"):
        found, wanted = read_whole(got / part), read_whole(want / part)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_run_writes_what_it_did(whole, model):
    folder, _ = whole
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    evaluated = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6]
    for row in evaluated:
        variance = row["eval/accuracy"] * (1 - row["eval/accuracy"]) / (4 - 1)
        assert row["eval/standard_error"] == pytest.approx(variance**0.5)
    assert any(row["eval/standard_error"] > 0 for row in evaluated)
    assert sorted({row["step"] for row in read_rows(folder / "samples.jsonl")}) == [1, 2, 4, 6]
    updated = [row for row in rows[1:] if "loss" in row]
    assert len(updated) >= 4
    for row in updated:
        assert row["head/active_rows"] <= row["head/rows"] * 0.2 + 2
        assert row["entropy/selected_fraction"] == pytest.approx(0.2, abs=0.05)
        assert row["entropy/p95"] >= row["entropy/threshold"] >= row["entropy/p50"] >= 0
        assert row["skipped/nonfinite_gradient"] == 0
        parts = ("time/sample", "time/score", "time/update")
        assert row["time/step"] == pytest.approx(sum(row[part] for part in parts), abs=1e-6)
        assert 0 < row["time/head"] < row["time/score"] + row["time/update"]
    before, after = map(read_whole, (Path(model), folder / "checkpoints" / "step-000006"))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (folder / "report.html").exists()


def test_the_same_seed_gives_the_same_run(whole, tmp_path):
    folder, config = whole
    train(elsewhere(config, tmp_path))
    assert_same_run(tmp_path / "run", folder)
    train(elsewhere(config, tmp_path, name="other", seed=4))
    assert metrics(tmp_path / "other") != metrics(folder)


def test_it_learns(model, tmp_path):
    """Even digits first, with the entropies of either policy."""
    for source in ("old", "current"):
        config = settings(
            tmp_path, model, name=source, steps=30, eval=Eval(30, 4), checkpoint_every=30
        )
        algorithm = dataclasses.replace(config.algorithm, entropy_source=source, fraction=0.5)
        train(dataclasses.replace(config, algorithm=algorithm))
        rewards = [row["reward/mean"] for row in metrics(tmp_path / source)[1:]]
        assert sum(rewards[-3:]) / 3 > 0.8 > 0.5 > rewards[0]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_exception_then_the_same_command(whole, tmp_path, stop):
    folder, config = whole

    def on_step(step):
        if step == stop:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(elsewhere(config, tmp_path), on_step)
    train(elsewhere(config, tmp_path))
    assert_same_run(tmp_path / "run", folder)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert len(starts) == 2


def doomed(config, step, operations):
    """A run that kills itself before its last step at the latest.

    With a number of `operations` on files: so many after the row of a checkpoint from `step` on.
    """

    def write(run, row):
        written(run, row)
        saved = row["step"] >= step and row["step"] % config.checkpoint_every == 0
        if saved and operations is not None:
            kill_after(operations)

    def on_step(done):
        if done == config.steps - 1:
            signal.raise_signal(signal.SIGKILL)

    written = trainer.run.Run.write
    trainer.run.Run.write = write
    use_task(Even())
    train(config, on_step)


def test_kill_9_at_any_moment(model, tmp_path, processes):
    """Killed ever later, half of the times between the row of a step and the end of its checkpoint.

    The moments are random, and those of what the run itself has done: no clock decides on them.
    """
    config = settings(tmp_path / "whole", model, steps=LONG)
    train(config)
    config = elsewhere(config, tmp_path)
    moments = random.Random(0)
    steps = sorted(moments.sample(range(LONG - 3), KILLS))
    # The first of them between the row and the checkpoint.
    saving = [0, *(moments.randrange(OPERATIONS) for _ in range(KILLS // 2 - 1))]
    for i, step in enumerate(steps):
        operations = saving[i // 2] if i % 2 else None
        process = processes.Process(target=doomed, args=(config, step, operations))
        process.start()
        if operations is None:
            wait_for_step(process, tmp_path / "run" / "metrics.jsonl", step)
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")


def wait_for_step(process, path, step):
    """Until the row of `step` is in `path`, or `process` has ended."""
    row = f'{{"step": {step},'
    while process.is_alive() and not (path.exists() and row in path.read_text()):
        time.sleep(0.001)


def interruptible(config, log):
    """A slow run by way of the command line, its stderr in `log`."""
    use_task(Even(pause=0.003))
    sys.stderr = log.open("w", buffering=1)
    options = ["--name", "run", "--root", config.root, "--steps", str(config.steps)]
    PRESETS["tiny"] = lambda: config
    with contextlib.redirect_stdout(sys.stderr):
        sys.exit(main(["train", *options]))


def test_ctrl_c_says_how_to_go_on(whole, tmp_path, processes):
    folder, config = whole
    config = elsewhere(config, tmp_path)
    log = tmp_path / "stderr"
    process = processes.Process(target=interruptible, args=(config, log))
    process.start()
    path = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and (not path.exists() or len(path.read_text().splitlines()) < 4):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(900)
    assert process.exitcode == 130
    said = log.read_text()
    assert re.search(r"\nstopped by Ctrl-C \w+ step [3-6] of 6; the last checkpoint is \S+\n", said)
    assert f"\nto go on: python -m trainer train --name run --root {config.root} --steps 6" in said
    assert "Traceback" not in said
    assert 4 <= len(metrics(tmp_path / "run")) < 7
    train(config)
    assert_same_run(tmp_path / "run", folder)


def test_more_steps_go_on(whole, tmp_path):
    """Four steps, then six: evaluated once more, at the fourth; else the same."""
    folder, config = whole
    train(elsewhere(config, tmp_path, steps=4))
    train(elsewhere(config, tmp_path))
    extra = {"eval/accuracy", "eval/standard_error", "eval/greedy", "eval/length"}
    got = metrics(tmp_path / "run")
    assert got[4].keys() >= extra
    got[4] = {k: v for k, v in got[4].items() if not k.startswith("eval/")}
    assert got == metrics(folder)


def test_a_finished_run_is_left_as_it_is(whole, tmp_path):
    folder, config = whole
    train(elsewhere(config, tmp_path))
    train(elsewhere(config, tmp_path))
    assert_same_run(tmp_path / "run", folder)


def test_other_settings_in_the_same_folder_are_refused(whole, tmp_path):
    folder, config = whole
    algorithm = dataclasses.replace(config.algorithm, fraction=0.5)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"other settings: algorithm.fraction was 0.2, now 0.5; seed was 3, now 4. Choose",
    ):
        train(dataclasses.replace(config, seed=4, algorithm=algorithm))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_may_be_moved(whole, tmp_path):
    folder, config = whole
    train(elsewhere(config, tmp_path / "a", steps=4))
    (tmp_path / "a" / "run").rename(tmp_path / "b")
    train(elsewhere(config, tmp_path, name="b"))
    assert metrics(tmp_path / "b")[-1] == metrics(folder)[-1]


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(whole, tmp_path, capfd):
    folder, config = whole
    config = elsewhere(config, tmp_path)
    train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    cut(next((checkpoints / "step-000006").glob("model*.safetensors")))
    train(config)
    error = capfd.readouterr().err
    assert re.search(r"step-000006/model\S*.safetensors is damaged: .*the checkpoint before", error)
    assert_same_run(tmp_path / "run", folder)
    for path in checkpoints.glob("step-*"):
        cut(path / "state.json")
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: .*delete .* start afresh"):
        train(config)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


class Hopeless(Even):
    """No response is right."""

    def reward(self, problem, response):
        return 0.0


def test_steps_without_a_useful_group_are_skipped_and_counted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.run, "make_task", lambda *_: Hopeless())
    train(settings(tmp_path, model, steps=2))
    rows = metrics(tmp_path / "run")
    for row in rows[1:]:
        assert row["skipped/few_groups"] == 1
        assert row["groups/all_wrong"] == row["groups/sampled"] == 8
        assert "loss" not in row
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    assert json.loads((last / "state.json").read_text()) == {
        "step": 2,
        "next_problem": 16,
        "updates": 0,
        "entropy": {},
    }
    before, after = read_whole(Path(model)), read_whole(last)
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_which_tokens(tmp_path, which):
    """The share is the same, their mean entropy is not."""
    model = save_folder(tmp_path / "model")
    algorithm = Algorithm(min_groups=1, max_rounds=2, which=which, fraction=0.5)
    train(settings(tmp_path, model, steps=1, algorithm=algorithm))
    row = metrics(tmp_path / "run")[1]
    assert row["entropy/selected_fraction"] == pytest.approx(0.5, abs=0.05)
    kept, mean = row["entropy/selected_mean"], row["entropy/mean"]
    assert {"top": kept > 1.05 * mean, "bottom": kept < 0.95 * mean, "random": True}[which]
    if which == "random":
        assert kept == pytest.approx(mean, rel=0.1)


def test_bf16_weights(model, tmp_path):
    """A step runs, moves the weights and stays finite; a resumed one is the same."""
    config = settings(tmp_path, steps=2, checkpoint_every=1)
    config = dataclasses.replace(config, model=Model(model, "bfloat16"))
    train(elsewhere(config, tmp_path, steps=1))
    train(config)
    train(elsewhere(config, tmp_path / "whole"))
    rows = metrics(tmp_path / "run")
    assert all(
        "log/nonfinite" not in row and not row["skipped/nonfinite_gradient"] for row in rows[1:]
    )
    assert rows[2] == metrics(tmp_path / "whole" / "run")[2]
    weights = read_whole(tmp_path / "run" / "checkpoints" / "step-000002")
    before = read_whole(Path(model))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert any((value.float() - before[name]).abs().max() > 5e-3 for name, value in weights.items())
