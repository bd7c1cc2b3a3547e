"""Checkpoints: what is kept, what is cleared away, and what a damaged one says."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.small import build_policy, save_folder
from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.config import Model
from trainer.policy import load_policy


def step_once(policy, optimizer):
    policy.model(torch.arange(6)[None]).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(policy):
    return torch.optim.AdamW(policy.model.parameters(), lr=1e-2)


@pytest.fixture
def saved(tmp_path):
    """A run's folder with checkpoint 2, and the policy and optimizer it is of."""
    policy = build_policy("qwen3")
    optimizer = adam(policy)
    step_once(policy, optimizer)
    checkpoint.save(tmp_path, policy, optimizer, Progress(2, 64, 5), 2)
    return tmp_path, policy, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_run_takes_the_same_next_step(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    settings = Model(path=save_folder(tmp_path / "model", "qwen3"), dtype=name)
    policy = load_policy(settings, 0, torch.device("cpu"))
    optimizer = adam(policy)
    step_once(policy, optimizer)
    path = checkpoint.save(tmp_path, policy, optimizer, Progress(2, 64, 5), 2)
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load_progress(path) == Progress(2, 64, 5)
    other = load_policy(Model(path=str(path), dtype=name), 0, torch.device("cpu"))
    again = adam(other)
    checkpoint.load_optimizer(path, again)
    step_once(policy, optimizer)
    step_once(other, again)
    want = policy.model.state_dict()
    assert all(torch.equal(value, want[key]) for key, value in other.model.state_dict().items())
    checkpoint.check(path)


def test_the_last_ones_are_kept_by_number(saved):
    """A million steps sort behind 999,999."""
    folder, policy, optimizer = saved
    for step in (4, 999_999, 1_000_000):
        checkpoint.save(folder, policy, optimizer, Progress(step), 2)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-1000000", "step-999999"]
    assert checkpoint.latest(folder).name == "step-1000000"


def test_without_a_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_unfinished_checkpoints_are_ignored_then_cleared(saved):
    folder, policy, optimizer = saved
    whole = folder / "checkpoints" / "step-000002"
    for name in (".unfinished-abc/checkpoint", ".unfinished-def"):
        shutil.copytree(whole, folder / "checkpoints" / name)
    (folder / "checkpoints" / "step-000009.tmp").mkdir()
    assert checkpoint.latest(folder) == whole
    checkpoint.save(folder, policy, optimizer, Progress(4), 2)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000009.tmp"]


def test_a_failed_save_leaves_the_last_one(saved, monkeypatch):
    folder, policy, optimizer = saved
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(folder, policy, optimizer, Progress(4), 2)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]


def test_a_checkpoint_gets_its_name_when_it_is_whole(saved, monkeypatch):
    """Stopped at the rename, everything is written and nothing has the name."""
    folder, policy, optimizer = saved
    written = []

    def stop(path, target):
        written.extend(file.name for file in path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, policy, optimizer, Progress(4), 2)
    whole = checkpoint.latest(folder)
    assert whole.name == "step-000002"
    assert sorted(written) == sorted(file.name for file in whole.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "half", "empty"])
def test_a_damaged_file_is_named(saved, name, damage):
    path = checkpoint.latest(saved[0])
    file = path / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(
        content[: len(content) // 2] if damage == "half" else b""
    )
    with pytest.raises(
        ValueError, match=re.escape(str(file)) + r" is damaged: .*Delete .*step-000002"
    ):
        checkpoint.check(path)


def test_a_state_of_another_form_is_named(saved):
    path = checkpoint.latest(saved[0])
    (path / "state.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(ValueError, match=r"state.json is damaged"):
        checkpoint.check(path)
