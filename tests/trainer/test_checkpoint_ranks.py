"""Checkpoints of several ranks: gloo processes, and a model sharded by FSDP2."""

import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.processes import forkserver
from tests.trainer.small import WORDS, build_model, build_tokenizer
from trainer import checkpoint
from trainer.checkpoint import Progress, sharded
from trainer.checkpoint.export import export
from trainer.policy import Policy
from trainer.ranks import Ranks

ROOT = Path(__file__).parents[2]
ALONE = Ranks(torch.device("cpu"))
STEPS, KILLS = 12, 6  # of a run that is killed on the way


def start(folder, size, call, *arguments):
    """Processes of `size` ranks that call `call(ranks, *arguments)`."""
    store = folder / f"store-{time.monotonic_ns()}"
    started = [
        forkserver().Process(target=joined, args=(store, rank, size, call, arguments))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def run(*arguments):
    """`start`, then wait: each rank must come to its end."""
    started = start(*arguments)
    codes = []
    for process in started:
        process.join(900)
        codes.append(process.exitcode)
        process.kill()
    assert codes == [0] * len(started)


def joined(store, rank, size, call, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    call(Ranks(torch.device("cpu"), rank, size, dist.group.WORLD), *arguments)
    dist.destroy_process_group()


def build(ranks, family="qwen3", dtype=torch.float32, seed=0):
    """A policy, sharded where there are several ranks, and its optimizer."""
    model = build_model(family, seed=seed).to(dtype)
    if ranks.group is not None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Policy(model, build_tokenizer()), optimizer


def step_once(policy, optimizer, tokens):
    policy.model(tokens).logits.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state(policy, optimizer):
    """Every tensor, whole."""
    tensors = sharded.weights(policy.model) | sharded.moments(policy.model, optimizer)
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
    }


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype
        assert torch.equal(value, want[name]), name


def pass_on(ranks, folder, model, step):
    """Resume from the last checkpoint, compare with what was first saved, save as `step`."""
    policy, optimizer = build(ranks, *model, seed=1)
    found = checkpoint.latest(folder, ranks)
    before = checkpoint.load(found, policy, optimizer, ranks)
    assert before == Progress(step - 1, 64, 5)
    assert_equal(state(policy, optimizer), load_file(folder / "want.safetensors"))
    if ranks.rank == 4:
        assert any(v.to_local().numel() == 0 for v in sharded.weights(policy.model).values())
    checkpoint.save(folder, policy, optimizer, Progress(step, 64, 5), 2, ranks)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [(("qwen3", torch.float32), [2, 4, 5]), (("llama", torch.bfloat16), [3, 2])],
    ids=["tied fp32, 1 2 4 5 1", "bf16, 1 3 2 1"],
)
def test_another_number_of_ranks_goes_on_bit_for_bit(tmp_path, model, sizes):
    """Shards are uneven, and on the last of five ranks some are empty."""
    policy, optimizer = build(ALONE, *model)
    for _ in range(2):
        step_once(policy, optimizer, torch.arange(6)[None])
    save_file(state(policy, optimizer), tmp_path / "want.safetensors")
    checkpoint.save(tmp_path, policy, optimizer, Progress(1, 64, 5), 2, ALONE)
    for step, size in enumerate(sizes, start=2):
        run(tmp_path, size, pass_on, tmp_path, model, step)
        last = checkpoint.latest(tmp_path, ALONE)
        assert len(list(last.glob("shard-*"))) == len(list((last / "optimizer").iterdir())) == size
    exported = AutoModelForCausalLM.from_pretrained(export(tmp_path, tmp_path / "exported"))
    assert_equal(exported.state_dict(), policy.model.state_dict())
    other = build(ALONE, *model, seed=1)
    checkpoint.load(last, *other, ALONE)
    assert_equal(state(*other), state(policy, optimizer))
    for trained in ((policy, optimizer), other):
        step_once(*trained, torch.arange(6)[None])
    assert_equal(state(*other), state(policy, optimizer))


def fill_the_disk_of_one(ranks, folder):
    """Rank 1 may write small files only."""
    policy, optimizer = build(ranks)
    step_once(policy, optimizer, torch.arange(6)[None])
    checkpoint.save(folder, policy, optimizer, Progress(2), 2, ranks)
    if ranks.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    with pytest.raises(OSError, match=r"step-000004 could not be written: File too large"):
        checkpoint.save(folder, policy, optimizer, Progress(4), 2, ranks)


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    run(tmp_path, 2, fill_the_disk_of_one, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def save_apart(ranks, folder):
    policy, optimizer = build(ranks)
    with pytest.raises(ValueError, match=r"lacks shard-00002-.* need the run's folder on one file"):
        checkpoint.save(folder / str(ranks.rank), policy, optimizer, Progress(), 2, ranks)


def test_ranks_without_a_common_file_system_are_refused(tmp_path):
    run(tmp_path, 2, save_apart, tmp_path)
    assert not list((tmp_path / "0" / "checkpoints").iterdir())


def agree_on(ranks, folder, want):
    """Every rank takes the same; so does the loop's next collective."""
    found = checkpoint.latest(folder, ranks)
    assert ranks.gather(found and found.name) == [want] * ranks.size


def save_three(ranks, folder):
    policy, optimizer = build(ranks)
    for step in (1, 2, 3):
        step_once(policy, optimizer, torch.arange(6)[None])
        checkpoint.save(folder, policy, optimizer, Progress(step), 3, ranks)
    with pytest.raises(ValueError, match="needs the group of its ranks"):
        checkpoint.save(folder / str(ranks.rank), policy, optimizer, Progress(4), 3, ALONE)


def test_ranks_agree_on_the_newest_whole_one(tmp_path):
    run(tmp_path, 2, save_three, tmp_path)
    for step, kept in ((3, "step-000002"), (2, "step-000001")):
        shards = sorted((tmp_path / "checkpoints" / f"step-{step:06d}").rglob("shard-*"))
        shards[step % len(shards)].write_bytes(b"?")
        run(tmp_path, 2, agree_on, tmp_path, kept)


def train(ranks, folder, through=True):
    """STEPS steps from the last checkpoint, each saved: a function of the step alone.

    One that is not to come `through` kills itself before the last step's.
    """
    policy, optimizer = build(ranks)
    found = checkpoint.latest(folder, ranks)
    progress = checkpoint.load(found, policy, optimizer, ranks) if found else Progress()
    while progress.step < STEPS:
        progress.step += 1
        generator = torch.Generator().manual_seed(progress.step)
        tokens = torch.randint(len(WORDS), (ranks.size, 8), generator=generator)
        step_once(policy, optimizer, tokens[ranks.rank :: ranks.size])
        if progress.step == STEPS and not through:
            signal.raise_signal(signal.SIGKILL)
        checkpoint.save(folder, policy, optimizer, progress, 2, ranks)


@pytest.mark.slow
def test_kill_9_of_any_rank_at_any_moment(tmp_path):
    """Either rank or both, ever later; the other rank dies soon after. No clock decides."""
    run(tmp_path, 2, train, tmp_path / "whole")
    moments = random.Random(0)
    for step in sorted(moments.sample(range(STEPS - 1), KILLS)):
        started = start(tmp_path, 2, train, tmp_path / "run", False)
        reached = checkpoint.path_of(tmp_path / "run", step)
        while all(process.is_alive() for process in started) and step and not reached.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        for victim in moments.choice([started[:1], started[1:], started]):
            victim.kill()
        for process in started:
            process.join(moments.uniform(0, 0.05))
            process.kill()
            process.join()
        assert all(process.exitcode != 0 for process in started)
        assert any(process.exitcode == -signal.SIGKILL for process in started)
    run(tmp_path, 2, train, tmp_path / "run")
    got, want = (checkpoint.latest(tmp_path / name, ALONE) for name in ("run", "whole"))
    assert got.name == want.name == f"step-{STEPS:06d}"
    for part in (".", "optimizer"):
        assert_equal(sharded.read_whole(got / part), sharded.read_whole(want / part))
