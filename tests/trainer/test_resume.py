"""Going on after a crash with other settings: which may differ, what comes of it, what is noted."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.trainer.small import Even, elsewhere, metrics, on_even, settings, use_task  # noqa: F401
from tests.trainer.test_train import assert_same_run
from trainer import checkpoint
from trainer.checkpoint.sharded import read_whole
from trainer.config.files import fill
from trainer.log import read_rows
from trainer.tasks.problem import Problem
from trainer.train import train

ROOT = Path(__file__).parents[2]


def crash(config, step=3):
    """Run until `step` is done, and no longer."""

    def on_step(done):
        if done == step:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, on_step)


def run_json(config):
    return json.loads((Path(config.root) / config.name / "run.json").read_text())


SAME = {
    "model.gradient_checkpointing": True,
    "warm_start.cache": "elsewhere",
    "keep_checkpoints": 9,
    "reward.workers": 1,
    "reward.seconds": 5.0,
    "reward.gigabytes": 1.0,
    "engine.memory_utilization": 0.4,
    "tracking.trackers": ("tensorboard",),
}
CLOSE = {
    "optimizer.tokens_per_micro_batch": 17,
    "rollout.batch_size": 3,
    "model.attention": "sdpa",
    "threads": 2,
}


@pytest.mark.parametrize("name", SAME)
def test_what_may_differ_changes_no_bit(whole, tmp_path, capsys, name):
    folder, config = whole
    config = elsewhere(config, tmp_path)
    crash(config)
    train(fill(config, {name: SAME[name]}))
    assert_same_run(tmp_path / "run", folder)
    assert f"changed  {name} was" in capsys.readouterr().out
    first, second = run_json(config)["starts"]
    assert (first["step"], first["changes"], second["step"]) == (0, {}, 2)
    assert second["changes"].keys() == {name}


@pytest.mark.parametrize("name", CLOSE)
def test_what_rounds_otherwise_ends_close_by(whole, tmp_path, capsys, name):
    folder, config = whole
    config = elsewhere(config, tmp_path)
    crash(config)
    changed = fill(config, {name: CLOSE[name]})
    train(changed)
    assert f"now {CLOSE[name]} (sums are rounded otherwise)" in capsys.readouterr().out
    for got, want in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert got.keys() == want.keys()
        for key in {"reward/mean", "tokens", "eval/accuracy", "loss", "grad_norm"} & want.keys():
            assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6), key
    last = Path("checkpoints", "step-000006")
    got, want = read_whole(tmp_path / "run" / last), read_whole(folder / last)
    for key, value in want.items():
        assert (got[key] - value).norm() <= 1e-4 * value.norm(), key
    # Back again needs no leave either.
    train(config)
    assert [start["changes"] for start in run_json(config)["starts"][1:]] == [
        {name: [getattr_path(config, name), CLOSE[name]]},
        {name: [CLOSE[name], getattr_path(config, name)]},
    ]


def getattr_path(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_other_checkpoints_samples_and_evaluations(whole, tmp_path):
    """The same training; each at its new steps."""
    folder, config = whole
    config = elsewhere(config, tmp_path)
    crash(config)
    other = {"checkpoint_every": 1, "samples_every": 5, "eval.every": 2, "eval.problems": 3}
    other |= {"keep_checkpoints": 1, "keep_every": 2}
    train(fill(config, other))
    for got, want in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert {k: v for k, v in got.items() if not k.startswith("eval/")} == {
            k: v for k, v in want.items() if not k.startswith("eval/")
        }
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 4, 6]
    assert list(checkpoint.steps_of(tmp_path / "run")) == [0, 2, 4, 6]


def test_other_settings_need_leave(whole, tmp_path, capsys):
    _, config = whole
    config = elsewhere(config, tmp_path)
    crash(config)
    other = fill(config, {"algorithm.fraction": 0.5, "optimizer.betas": (0.5, 0.9), "threads": 1})
    before = run_json(config)
    says = (
        r"algorithm.fraction was 0.2, now 0.5; optimizer.betas was \[0.9, 0.95\], now \[0.5, 0.9\]."
        r".*by --allow-changes algorithm.fraction optimizer.betas; .*--branch \S+/run --name NEW"
    )
    with pytest.raises(ValueError, match=says):
        train(other)
    with pytest.raises(
        ValueError, match=r"settings: optimizer.betas was .*changes algorithm optimizer.betas;"
    ):
        train(other, allow_changes=["algorithm"])
    with pytest.raises(ValueError, match="no setting 'fraction' to be changed"):
        train(other, allow_changes=["fraction"])
    assert run_json(config) == before
    train(other, allow_changes=["algorithm", "optimizer.betas"])
    assert "changed  algorithm.fraction was 0.2, now 0.5\n" in capsys.readouterr().out
    start = run_json(config)["starts"][-1]
    assert start["changes"] == {
        "algorithm.fraction": [0.2, 0.5],
        "optimizer.betas": [[0.9, 0.95], [0.5, 0.9]],
    }
    kept = [row.get("entropy/selected_fraction") for row in metrics(tmp_path / "run")[1:]]
    assert [round(share, 1) for share in kept if share is not None][-4:] == [0.5] * 4
    # The same command again: nothing is left to allow, and nothing is wrong with that.
    train(other, allow_changes=["algorithm", "optimizer.betas"])
    with pytest.raises(ValueError, match=r"algorithm.fraction was 0.5, now 0.2"):
        train(config)


class Growing(Even):
    """Prompts of one token, and from the 12th problem on of 60."""

    def problem(self, split, index):
        long = split == "train" and index >= 600
        return Problem("1 " * (60 if long else 1), None)


def test_a_prompt_without_room_is_mended_by_shorter_responses(model, tmp_path):
    """The task is endless: nobody has seen its later prompts at the start."""
    use_task(Growing())
    config = settings(tmp_path, model)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, prompts=100, group_size=2, batch_size=200),
        optimizer=dataclasses.replace(config.optimizer, tokens_per_micro_batch=4096),
        algorithm=dataclasses.replace(config.algorithm, max_rounds=2, min_groups=100),
    )
    says = r"60 tokens and up to 6 .*lower rollout.max_new_tokens.*--allow-changes rollout.max_new"
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            train(config)
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] < 6
    shorter = fill(config, {"rollout.max_new_tokens": 4})
    with pytest.raises(ValueError, match=r"allow-changes rollout.max_new_tokens"):
        train(shorter)
    train(shorter, allow_changes=["rollout.max_new_tokens"])
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6


def test_a_damaged_or_missing_run_json(whole, tmp_path):
    _, config = whole
    config = elsewhere(config, tmp_path)
    crash(config)
    path = tmp_path / "run" / "run.json"
    for content in ("", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"run.json is damaged"):
            train(config)
    path.unlink()
    with pytest.raises(ValueError, match=r"has checkpoints and no run.json"):
        train(config)


def test_a_run_of_before_there_was_a_record(whole, tmp_path):
    """Starts without inputs, directory and changes, a configuration without the new settings."""
    folder, config = whole
    config = elsewhere(config, tmp_path)
    crash(config)
    run = run_json(config)
    for start in run["starts"]:
        for key in ("step", "directory", "inputs", "left_out", "changes"):
            del start[key]
    del run["config"]["keep_every"], run["config"]["data"]["max_prompt_tokens"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    train(config)
    assert_same_run(tmp_path / "run", folder)
