"""Checkpoints of one process: what is kept, what is cleared away, and what a damaged one says."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.small import build_policy, load_policy, save_folder
from trainer import checkpoint
from trainer.checkpoint import Progress, sharded
from trainer.config import Model
from trainer.policy import read_policy
from trainer.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(CPU)


def step_once(policy, optimizer):
    policy.model(torch.arange(6)[None]).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(policy):
    return torch.optim.AdamW(policy.model.parameters(), lr=1e-2)


def save(folder, policy, optimizer, progress, keep=2):
    return checkpoint.save(folder, policy, optimizer, progress, keep, ALONE)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.fixture
def saved(tmp_path):
    """A run's folder with checkpoint 2, and the policy and optimizer it is of."""
    policy = build_policy("qwen3")
    optimizer = adam(policy)
    step_once(policy, optimizer)
    save(tmp_path, policy, optimizer, Progress(2, 64, 5))
    return tmp_path, policy, optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "phi"])  # tied; a head of its own, with a bias
def test_a_loaded_run_takes_the_same_next_step(tmp_path, dtype, family):
    settings = Model(path=save_folder(tmp_path / "model", family), dtype=dtype)
    policy = load_policy(settings)
    optimizer = adam(policy)
    step_once(policy, optimizer)
    path = save(tmp_path, policy, optimizer, Progress(2, 64, 5))
    assert checkpoint.latest(tmp_path, ALONE) == path
    assert checkpoint.check(path, ALONE) is None
    other = read_policy(Model(path=str(path), dtype=dtype), 0, empty=True)
    other.materialize(CPU)
    again = adam(other)
    assert checkpoint.load(path, other, again, ALONE) == Progress(2, 64, 5)
    assert {state["step"].item() for state in again.state.values()} == {1.0}
    step_once(policy, optimizer)
    step_once(other, again)
    want = policy.model.state_dict()
    assert all(torch.equal(value, want[key]) for key, value in other.model.state_dict().items())


def test_nothing_in_it_is_a_pickle(saved):
    """Files of tensors and of text, and no other."""
    path = checkpoint.latest(saved[0], ALONE)
    assert {Path(name).suffix for name in files(path)} == {".safetensors", ".json"}
    for name in files(path):
        if name.endswith(".json"):
            json.loads((path / name).read_text())


def test_an_optimizer_without_a_state_stays_so(tmp_path):
    policy = build_policy("qwen3")
    optimizer = adam(policy)
    path = save(tmp_path, policy, optimizer, Progress())
    assert not optimizer.state
    again = adam(policy)
    checkpoint.load(path, policy, again, ALONE)
    assert not again.state


def test_transformers_loads_one_of_one_process(saved):
    folder, policy, _ = saved
    path = checkpoint.latest(folder, ALONE)
    model = AutoModelForCausalLM.from_pretrained(path)
    want = policy.model.state_dict()
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    assert type(model) is type(policy.model)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_large_ones_are_split_into_files(saved, monkeypatch):
    folder, policy, optimizer = saved
    monkeypatch.setattr(sharded, "FILE_BYTES", 4096)
    path = save(folder, policy, optimizer, Progress(4))
    assert len(list(path.glob("*.safetensors"))) > 2
    assert all(file.stat().st_size < 3 * 4096 for file in path.glob("*.safetensors"))
    want = sharded.read_whole(path.with_name("step-000002"))
    assert all(torch.equal(value, want[key]) for key, value in sharded.read_whole(path).items())


def test_another_model_is_refused(saved, tmp_path):
    path = checkpoint.latest(saved[0], ALONE)
    wider = build_policy("qwen3", intermediate_size=48)
    with pytest.raises(ValueError, match=r"step-000002 is not of this model: .*[Ss]ize mismatch"):
        checkpoint.load(path, wider, None, ALONE)
    deeper = build_policy("qwen3", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"step-000002 is not of this model: .*layers.2"):
        checkpoint.load(path, deeper, None, ALONE)
    shallower = build_policy("qwen3", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"optimizer has .*layers.1.*, and the optimizer no"):
        checkpoint.load(path, shallower, adam(shallower), ALONE)


def test_the_last_ones_are_kept_by_number(saved):
    """A million steps sort behind 999,999."""
    folder, policy, optimizer = saved
    for step in (4, 999_999, 1_000_000):
        save(folder, policy, optimizer, Progress(step))
    assert names(folder) == ["step-1000000", "step-999999"]
    assert checkpoint.latest(folder, ALONE).name == "step-1000000"


def test_those_at_multiples_stay(saved):
    """The first among them; of the others the last; no half of a replaced one."""
    folder, policy, optimizer = saved
    for step in (0, 2, 3, 4, 5, 6, 7, 8, 8):
        checkpoint.save(folder, policy, optimizer, Progress(step), 1, ALONE, keep_every=3)
    assert names(folder) == ["step-000000", "step-000003", "step-000006", "step-000008"]
    assert list(checkpoint.steps_of(folder)) == [0, 3, 6, 8]
    save(folder, policy, optimizer, Progress(9), keep=2)
    assert names(folder) == ["step-000008", "step-000009"]


def test_without_a_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path, ALONE) is None


def test_unfinished_checkpoints_are_ignored_then_cleared(saved):
    folder, policy, optimizer = saved
    whole = folder / "checkpoints" / "step-000002"
    for name in (".unfinished-abc", ".unfinished-def/checkpoint"):
        shutil.copytree(whole, folder / "checkpoints" / name)
    (folder / "checkpoints" / "step-000009.tmp").mkdir()
    assert checkpoint.latest(folder, ALONE) == whole
    save(folder, policy, optimizer, Progress(4))
    assert names(folder) == ["step-000002", "step-000004", "step-000009.tmp"]


def test_a_failed_save_leaves_the_last_one(saved, monkeypatch):
    folder, policy, optimizer = saved
    monkeypatch.setattr(checkpoint.manifest, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(folder, policy, optimizer, Progress(4))
    assert names(folder) == ["step-000002"]


def test_a_checkpoint_gets_its_name_when_it_is_whole(saved, monkeypatch):
    """Stopped at the rename, everything is written and nothing has the name."""
    folder, policy, optimizer = saved
    written = []

    def stop(path, target):
        written.extend(files(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save(folder, policy, optimizer, Progress(4))
    whole = checkpoint.latest(folder, ALONE)
    assert whole.name == "step-000002"
    assert sorted(written) == files(whole)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_one_that_is_written_again_is_never_gone(saved, monkeypatch, renames):
    """The process stops before one of the renames: aside, to the name, and away."""
    folder, policy, optimizer = saved
    rename, done = Path.rename, []

    def stop(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save(folder, policy, optimizer, Progress(2, 99))
    monkeypatch.undo()
    path = checkpoint.latest(folder, ALONE)
    assert checkpoint.load(path, policy, None, ALONE).next_problem == (99 if renames == 2 else 64)
    save(folder, policy, optimizer, Progress(2, 100), keep=1)
    assert names(folder) == ["step-000002"]


@pytest.mark.parametrize(
    "name", ["model-*.safetensors", "optimizer/*.safetensors", "config.json", "state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "one bit"])
def test_a_damaged_one_is_named_and_the_older_one_used(saved, capsys, name, damage):
    folder, policy, optimizer = saved
    path = save(folder, policy, optimizer, Progress(4))
    (file,) = path.glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "missing":
        file.write_bytes({"cut": content[:-1], "empty": b"", "one bit": content}[damage])
    assert checkpoint.latest(folder, ALONE).name == "step-000002"
    what = {
        "missing": r"cannot be read: No such file",
        "one bit": r"is damaged: its CRC-32 is \w{8}, \w{8} was written",
    }.get(damage, r"is damaged: it has [\d,]+ bytes, [\d,]+ were written")
    assert re.search(
        f"warning: {re.escape(str(file))} {what}.*; trying the checkpoint before it",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("content", [None, "", "[]", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_named(saved, content):
    file = checkpoint.latest(saved[0], ALONE) / "manifest.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(
        ValueError, match=rf"no checkpoint of .* is whole: {re.escape(str(file))} .*start afresh"
    ):
        checkpoint.latest(saved[0], ALONE)


def limited_save(folder, policy, optimizer, limit):
    """In a process whose files may grow to `limit` bytes; its error and exit status."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(folder, policy, optimizer, Progress(4))
        except OSError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.parametrize("limit", [100, 10_000])
def test_files_that_cannot_grow(saved, limit):
    """A real failure of the writes: of small files, and of the weights alone."""
    folder, policy, optimizer = saved
    error = limited_save(folder, policy, optimizer, limit)
    need = sum(p.numel() for p in policy.model.parameters()) * 12 + 24 * 4
    assert re.search(
        rf"step-000004 could not be written: File too large; it needs {need:,} bytes, "
        r"[\d,]+ are free. The checkpoint before it stays",
        error,
    )
    assert names(folder) == ["step-000002"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root's rights on Linux")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk):
    """Checkpoints of about 100 kB are written until there is no room, then one fits again."""
    policy = build_policy("qwen3", vocab_size=256)
    optimizer = adam(policy)
    step_once(policy, optimizer)
    steps = itertools.count(1)

    def fill():
        while True:
            save(small_disk, policy, optimizer, Progress(next(steps)), keep=9)

    with pytest.raises(OSError, match=r"No space left on device; it needs [\d,]+ bytes") as caught:
        fill()
    step = next(steps) - 1
    assert caught.value.errno == errno.ENOSPC
    need, free = (int(n.replace(",", "")) for n in re.findall(r" ([\d,]{5,}) ", str(caught.value)))
    assert free < need < 512 * 1024
    assert names(small_disk) == [f"step-{n:06d}" for n in range(1, step)]
    assert checkpoint.latest(small_disk, ALONE).name == f"step-{step - 1:06d}"
    shutil.rmtree(small_disk / "checkpoints" / "step-000001")
    assert save(small_disk, policy, optimizer, Progress(step), keep=9)
