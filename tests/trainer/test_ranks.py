"""Two and four processes give the gradients and the run of one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests.marks import sampled
from tests.trainer.small import Even, build_policy, save_folder, settings, use_task
from tests.trainer.update_cases import (
    ALONE,
    configure,
    distance,
    off_policy,
    roll,
    step,
)
from tests.trainer.worlds import ROOT, next_world, run_ranks
from trainer.checkpoint.sharded import read_whole
from trainer.config import Algorithm, Eval, Model
from trainer.engines.transformers import TransformersEngine
from trainer.fsdp import shard, whole
from trainer.log import read_rows
from trainer.ranks import Ranks, join
from trainer.train import train
from trainer.update import score

pytestmark = sampled(0.2)

SIZES = (2, 4)
LAYERS = 2
# Gradients: name -> family, objective, and what else is special. Sums of fp32 in another order
# differ by some 1e-7 of the norm.
CASES = {
    "plain": ("llama", Algorithm(), {}),
    "tied": ("qwen3", Algorithm(loss_type="grpo", entropy_source="current"), {}),
    "padded": ("qwen3", Algorithm(denominator="all", entropy_source="current"), {"padded": True}),
    "checkpointing": ("qwen3", Algorithm(loss_type="grpo"), {"checkpointing": True}),
    "frozen": ("llama", Algorithm(), {"frozen": True}),
    "few": ("qwen3", Algorithm(fraction=1.0), {"rows": 3}),
    "bf16": ("qwen3", Algorithm(fraction=1.0), {"compute_dtype": torch.bfloat16}),
}
# Runs: name -> objective.
ROUNDS = partial(Algorithm, min_groups=1, max_rounds=2)
RUNS = {
    # The sampler's entropies, compared with the policy's on some steps.
    "dapo": ROUNDS(compare_every=2),
    "grpo": ROUNDS(loss_type="grpo", entropy_source="current", denominator="all"),
    "mask": ROUNDS(old_logprob="recomputed", entropy_source="sampler", compare_every=0),
    "bottom": ROUNDS(which="bottom", entropy_source="old", correction="mis"),
    "random": ROUNDS(which="random", fraction=0.5, correction="tis"),
    "prefix": ROUNDS(loss_type="grpo", which="nat-prefix", fraction=0.5),
}


class Gathers(TorchDispatchMode):
    """The sizes of what is gathered, in elements."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather_base" in str(function):
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def case(name: str, ranks: Ranks) -> dict:
    """The gradients of one optimizer step and its metrics, and what was gathered for it."""
    family, algorithm, special = CASES[name]
    policy = build_policy(family, spread=0.2)
    if "padded" in special:
        policy.layout = "padded"
    batch = off_policy(policy)
    batch = batch.rows(torch.arange(special.get("rows", len(batch.rollouts))))
    if "frozen" in special:
        policy.model.lm_head.weight.requires_grad_(False)
    if "checkpointing" in special:
        enable = policy.model.gradient_checkpointing_enable
        getattr(policy.model, "activation_checkpointing_enable", enable)({"use_reentrant": False})
    sequences = []
    forward = policy.forward
    policy.forward = lambda packed, *rest: (sequences.append(packed), forward(packed, *rest))[1]
    if ranks.group is not None:
        shard(policy, policy.model, ranks, special.get("compute_dtype"))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.append(x.numel() * x.element_size()), x)[1], lambda x: x
    )
    with Gathers() as gathers, hooks:
        got, metrics = step(policy, batch, configure(algorithm, tokens=20), ranks)
    sizes = sorted(gathers.sizes)
    return {
        "gradients": got,
        "metrics": metrics,
        "micro_batches": len(sequences),
        "empty": sum(len(packed.index_T) == 0 for packed in sequences),
        "saved": sum(saved),
        "gathers": {size: sizes.count(size) for size in sizes},
    }


def scores(ranks: Ranks) -> dict:
    """Statistics of all responses, and the threshold of all ranks."""
    policy = build_policy(spread=0.2)
    rollouts = roll(policy)
    if ranks.group is not None:
        shard(policy, policy.model, ranks, None)
    logprob, entropy, threshold, _ = score(policy, rollouts, configure(tokens=20), ranks)
    return {"logprob": logprob, "entropy": entropy, "threshold": threshold}


def replica(ranks: Ranks) -> list[torch.Tensor]:
    """What the engine samples with after the weights have moved, and the weights."""
    policy = build_policy("qwen3")
    engine = TransformersEngine(policy, batch_size=8, copy_in=torch.float32)
    if ranks.group is not None:
        shard(policy, policy.model, ranks, None)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    engine.update_weights(policy.weights())
    moved = [whole(p.detach()) for p in policy.model.parameters()]
    return [*zip(engine._policy.model.parameters(), moved, strict=True)]


def everything(model: str, root: Path, runs: list[str]) -> dict:
    """All of the above on these ranks, and the runs, which write their folders."""
    use_task(Even())
    with join("cpu") as ranks:
        found = {name: case(name, ranks) for name in CASES}
        found |= {"scores": scores(ranks), "replica": replica(ranks)}
    reads = []
    from_pretrained = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = lambda *rest, **options: (
        reads.append(rest),
        from_pretrained(*rest, **options),
    )[1]
    for name in runs:
        next_world()
        train(run_settings(model, root, name))
    next_world()
    with pytest.raises(ValueError, match=r"no model can be loaded from .*without-weights"):
        train(run_settings(str(Path(model).parent / "without-weights"), root / "no", "dapo"))
    return found | {"reads": len(reads)}


def run_settings(path: str, root: Path, name: str, **changes):
    """Steps so small that AdamW, which divides by what may be rounding, moves little by it."""
    asked = Eval(4, 5, data=("ladder",), samples=3)  # five problems: ranks have unequal shares
    config = settings(root, path, name=name, steps=4, eval=asked, checkpoint_every=2)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4)
    return dataclasses.replace(config, algorithm=RUNS[name], optimizer=optimizer, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = save_folder(tmp_path_factory.mktemp("models") / "model", "qwen3", spread=0.2)
    broken = Path(path).parent / "without-weights"
    shutil.copytree(path, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Results of one process without a group."""
    root = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.make_task", lambda *_: Even())
        for name in RUNS:
            train(run_settings(model, root, name))
    found = {name: case(name, ALONE) for name in CASES} | {"scores": scores(ALONE)}
    return found, root


@pytest.fixture(scope="module")
def worlds(model, tmp_path_factory):
    """Results of two and four processes."""
    folder = tmp_path_factory.mktemp("worlds")
    runs = {2: list(RUNS), 4: ["grpo"]}
    return {
        size: (
            run_ranks(
                size, everything, folder / str(size), model, folder / f"runs-{size}", runs[size]
            ),
            folder / f"runs-{size}",
        )
        for size in SIZES
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_one_process(alone, worlds, size, name):
    """1e-6 of the norm of all gradients together; in bf16, of the fp32 ones, some roundings."""
    want, (ranks, _) = alone[0][name], worlds[size]
    bound = 16 * torch.finfo(torch.bfloat16).eps if name == "bf16" else 1e-6
    for found in ranks:
        assert {x.dtype for x in found[name]["gradients"]} == {torch.float32}
        assert distance(found[name]["gradients"], want["gradients"]) < bound
        assert found[name]["metrics"] == ranks[0][name]["metrics"]
        if name != "bf16":
            assert found[name]["metrics"] == pytest.approx(want["metrics"], rel=1e-5, abs=1e-7)
    assert want["gathers"] == {}


@pytest.mark.parametrize("size", SIZES)
def test_ranks_share_the_work_and_some_have_none(worlds, size):
    ranks, _ = worlds[size]
    for name in CASES:
        assert len({found[name]["micro_batches"] for found in ranks}) == 1
    assert ranks[0]["plain"]["micro_batches"] >= 2
    assert sum(found["few"]["empty"] for found in ranks) == (1 if size == 4 else 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_the_head_is_gathered_once_a_micro_batch(worlds, size, name):
    """Embedding, norm and head in one gather; each layer for forward and for backward."""
    for found in worlds[size][0]:
        count = found[name]["micro_batches"]
        assert sorted(found[name]["gathers"].values()) == [count, 2 * LAYERS * count]


@pytest.mark.parametrize("size", SIZES)
def test_checkpointing_keeps_less_for_backward(alone, worlds, size):
    """Bytes saved by the layers and the rest, of all micro-batches; the gradients are above."""
    for found in (alone[0], *worlds[size][0]):
        assert found["checkpointing"]["saved"] < 0.4 * found["tied"]["saved"]


@pytest.mark.parametrize("size", SIZES)
def test_scores_and_threshold_are_those_of_one_process(alone, worlds, size):
    want, ranks = alone[0]["scores"], worlds[size][0]
    for name, value in want.items():
        for found in ranks:
            assert torch.equal(found["scores"][name], ranks[0]["scores"][name])
            torch.testing.assert_close(found["scores"][name], value, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_rank_reads_the_model_for_all(worlds, size):
    """A run's, and one that is not there, of which all ranks tell."""
    runs = len(RUNS) if size == 2 else 1
    assert [found["reads"] for found in worlds[size][0]] == [runs + 1, *[0] * (size - 1)]


@pytest.mark.parametrize("size", SIZES)
def test_the_engine_gets_whole_weights(worlds, size):
    for found in worlds[size][0]:
        assert all(torch.equal(copied, weight) for copied, weight in found["replica"])


@pytest.mark.parametrize(("size", "name"), [*((2, name) for name in RUNS), (4, "grpo")])
def test_the_run_is_that_of_one_process(alone, worlds, size, name):
    """The same tokens and rewards to the bit, all else to rounding."""
    one, several = alone[1] / name, worlds[size][1] / name
    rows = [read_rows(folder / "metrics.jsonl") for folder in (one, several)]
    assert sum("loss" in row for row in rows[0]) == 4
    exact = ("reward/", "response/", "groups/", "eval/", "tokens", "head/rows", "step", "lr")
    for want, got in zip(*rows, strict=True):
        assert want.keys() == got.keys()
        for key, value in want.items():
            if key.startswith(exact) and key != "tokens_per_second":
                assert got[key] == value
            elif not key.startswith("time/") and key != "tokens_per_second":
                assert got[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
    texts = [
        [
            (row["prompt"], row["response"], row["selected"])
            for row in read_rows(folder / "samples.jsonl")
        ]
        for folder in (one, several)
    ]
    assert texts[0] == texts[1]
    before, want, got = (
        read_whole(folder / "checkpoints" / step)
        for folder, step in ((one, "step-000002"), (one, "step-000004"), (several, "step-000004"))
    )
    # The weights agree as one vector, and not because they stay where they are.
    assert distance(got.values(), want.values()) < 1e-6
    assert distance(before.values(), want.values()) > 1e-4


def test_mixed_precision_of_one_process(model, tmp_path, monkeypatch):
    """A world of one rank: bf16 arithmetic, fp32 weights, which small steps move; it resumes."""
    monkeypatch.setattr("trainer.run.make_task", lambda *_: Even())
    mixed = Model(path=model, compute_dtype="bfloat16", gradient_checkpointing=True)
    for steps in (2, 4):
        train(run_settings(model, tmp_path, "dapo", model=mixed, steps=steps))
    rows = read_rows(tmp_path / "dapo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(5))
    assert all(row["skipped/nonfinite_gradient"] == 0 for row in rows if "loss" in row)
    before, after = (
        read_whole(tmp_path / "dapo" / "checkpoints" / f"step-00000{step}") for step in (2, 4)
    )
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert 0 < distance(after.values(), before.values()) < 1e-2


@pytest.mark.slow
def test_torchrun_and_python_are_one_program(tmp_path):
    """By the command line, resumed with torchrun; one process writes."""
    options = ["--name", "run", "--steps", "2", "--eval.problems", "4", "--threads", "1"]
    options += ["--rollout.prompts", "3", "--rollout.group-size", "2", "--warm-start.steps", "0"]
    options += ["--rollout.max-new-tokens", "8", "--device", "cpu", "--checkpoint-every", "1"]
    options += ["--algorithm.min-groups", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    outputs = []
    for root, launcher in (
        ("plain", []),
        ("torchrun", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        command = [sys.executable, *launcher, "-m", "trainer", "train", "--root", root, *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.replace(root, "ROOT"))
    assert outputs[1].count("report: ") == outputs[1].count("RL 2/2") == 1
    rows = [read_rows(tmp_path / root / "run" / "metrics.jsonl") for root in ("plain", "torchrun")]
    assert [row["step"] for row in rows[1]] == [0, 1, 2]
    for want, got in zip(*rows, strict=True):
        for key in want.keys() - {"tokens_per_second"}:
            assert key.startswith("time/") or got[key] == want[key]
    starts = json.loads((tmp_path / "torchrun" / "run" / "run.json").read_text())["starts"]
    assert [start["device"] for start in starts] == ["2 x cpu, 1 threads"]
    assert (tmp_path / "torchrun" / "run" / "report.html").exists()
