"""examples/several_ranks.py: DDP and FSDP2 with micro-batches give one process's step."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import entropy_kernels as ek
from tests.processes import spawn

for package in ("transformers", "accelerate"):
    pytest.importorskip(package, reason="the example's model, and another loop of it")

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "several_ranks.py"
# Ranks, whether by FSDP2, and micro-batches. Seven sequences: with four, each has an empty one.
CASES = [(2, False, 1), (2, True, 3), (3, False, 4), (3, True, 1), (3, True, 4)]


@functools.cache
def example():
    spec = importlib.util.spec_from_file_location("several_ranks", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(fsdp, count, group):
    """Metrics and gradients of an update on the weights that scored, and of one on others."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    device = torch.device("cpu")
    model = example().wrap(example().build_model(device), fsdp)
    parts = example().micro_batches(rank, ranks, count, device)
    denominator, found = example().score(model, parts, group), []
    for _ in range(2):
        metrics = example().backward(model, parts, denominator, group)
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
        found.append((metrics, {n: g.clone() for n, g in whole.items()}))
        model.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
    return found, sum(not part["mask"].any() for part in parts)


def by_accelerate(count):
    """The first of `steps`, in accelerate's loop, whose backward divides by the micro-batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    model = example().build_model(accelerator.device)
    example().patch_lm_head(model)
    model = accelerator.prepare(model)
    parts = example().micro_batches(rank, ranks, count, accelerator.device)
    denominator = example().score(model, parts, dist.group.WORLD)
    for part in parts:
        with accelerator.accumulate(model):
            out = model(part["tokens"], target=part["target"])
            rollouts = part["old_logprob"], part["advantage"], part["mask"]
            kept = {"selected": part["keep"], "denominator": denominator}
            loss, _ = ek.ratio_loss(out.logprob, *rollouts, **kept)
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)
    assert ranks == 2
    assert accelerator.sync_gradients
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def on_rank(rank, folder, ranks):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        cases = [case[1:] for case in CASES if case[0] == ranks]
        found = {case: steps(*case, dist.group.WORLD) for case in cases}
        if ranks == 2:
            # The group is there: accelerate asks for its place, and uses no address.
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            place |= {"MASTER_ADDR": "none", "MASTER_PORT": 0, "LOCAL_WORLD_SIZE": ranks}
            os.environ |= {name: str(value) for name, value in place.items()}
            torch.save(by_accelerate(3), f"{folder}/accelerate.pt")
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    return steps(False, 1, None)[0]


@pytest.fixture(scope="module", params=[2, 3], ids="{}-ranks".format)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"{request.param}-ranks")
    spawn(on_rank, args=(str(folder), request.param), nprocs=request.param)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(int(folder.name[0]))]


def test_every_update_is_that_of_one_process(folder, ranks, alone):
    cases = ranks[0].keys()
    assert {(len(ranks), *case) for case in cases} == {c for c in CASES if c[0] == len(ranks)}
    for case in cases:
        assert sum(rank[case][1] for rank in ranks) == max(len(ranks) * case[1] - 7, 0)
        for rank in ranks:
            for got, want in zip(rank[case][0], alone, strict=True):
                check(got, want, case)
    accelerated = folder / "accelerate.pt"
    assert accelerated.exists() == (len(ranks) == 2)
    if accelerated.exists():
        check_gradients(torch.load(accelerated), alone[0][1], "accelerate")


def check(got, want, case):
    """Metrics and the gradient to 1e-6; each of its tensors, some of which cancel, to 2e-6."""
    assert got[0].keys() == want[0].keys()
    for name, value in want[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=1e-6, atol=1e-7, msg=f"{case}: {name}")
    check_gradients(got[1], want[1], case)


def check_gradients(got, want, case):
    assert got.keys() == want.keys()
    errors = {name: (got[name] - grad).norm() for name, grad in want.items()}
    norm = torch.nn.utils.get_total_norm(want.values())
    assert torch.stack([*errors.values()]).norm() <= 1e-6 * norm, case
    for name, grad in want.items():
        assert errors[name] <= 2e-6 * grad.norm(), f"{case}: {name}"


@pytest.mark.slow
def test_torchrun_prints_the_lines_of_one_process(tmp_path):
    lines = run(tmp_path, str(EXAMPLE))
    line = r"update \d: loss \S+, gradient norm \S+, ratio \d\.\d{4}, selected 16 of 78 tokens"
    assert len(lines) == 3
    assert all(re.fullmatch(line, each) for each in lines), lines
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert run(tmp_path, *torchrun, str(EXAMPLE), "--micro-batches=2", "--fsdp") == lines


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
