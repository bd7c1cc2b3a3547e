"""What is not finite, or carries nothing, reaches no weight, no moment and no checkpoint."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import trainer.update
from tests.trainer.small import (  # noqa: F401
    build_model,
    build_policy,
    on_even,
    save_folder,
    settings,
)
from tests.trainer.update_cases import ALONE, CONFIG, configure, on_policy
from tests.trainer.worlds import run_ranks
from trainer import checkpoint
from trainer import train as loop
from trainer.checkpoint import Progress
from trainer.checkpoint.sharded import read_whole
from trainer.config import Algorithm, Data, Optimizer, WarmStart
from trainer.engines.transformers import TransformersEngine
from trainer.finite import Guard, NotFinite, check_finite, first_nonfinite
from trainer.fsdp import shard
from trainer.log import read_rows
from trainer.ranks import join
from trainer.tasks import make_task
from trainer.tiny.model import build_tiny
from trainer.tiny.warm_start import warm_start
from trainer.train import train
from trainer.update import update


def read_state(config):
    """Every tensor of the run's checkpoints, with "updates"."""
    found = {}
    for path in sorted((Path(config.root) / "run" / "checkpoints").glob("step-*")):
        found |= {f"{path.name}/{name}": value for name, value in read_whole(path).items()}
        if (path / "optimizer").exists():
            moments = read_whole(path / "optimizer")
            found |= {f"{path.name}/{name}": value for name, value in moments.items()}
    return found


def state(policy, optimizer):
    """Weights and all that AdamW keeps."""
    return copy.deepcopy((policy.model.state_dict(), optimizer.state_dict()["state"]))


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    return all(map(equal, left, right))


def moved_policy():
    """A policy, its optimizer after a step, and a batch."""
    policy = build_policy(spread=0.2)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, weight_decay=0.1)
    batch, _ = on_policy(policy)
    update(policy, optimizer, batch, configure(), ALONE)
    return policy, optimizer, batch


def skipped(algorithm=CONFIG.algorithm, **changes):
    """The metrics of an update on a batch with `changes`, which moves nothing."""
    policy, optimizer, batch = moved_policy()
    before = state(policy, optimizer)
    changed = dataclasses.replace(
        batch, **{name: change(getattr(batch, name)) for name, change in changes.items()}
    )
    metrics, _ = update(policy, optimizer, changed, configure(algorithm), ALONE)
    assert equal(state(policy, optimizer), before)
    assert all(p.grad is None for p in policy.model.parameters())
    return metrics


NO_TOKEN = {"selected_T": torch.zeros_like, "threshold": lambda _: torch.tensor(1e9)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_an_update_ruins_ends_the_run_before_a_checkpoint(
    model, tmp_path, monkeypatch, value
):
    plain = torch.optim.AdamW.step

    def step(optimizer):
        plain(optimizer)
        parameter = optimizer.param_groups[0]["params"][3]
        if optimizer.state[parameter]["step"] == 5:
            parameter.data[1, 1] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = settings(tmp_path, model)
    with pytest.raises(
        ValueError,
        match=r"step 3: model\.layers\.0\.\S+ is not finite after this update; "
        r"go back to .*step-000002$",
    ):
        train(config)
    kept = read_state(config)
    assert {name.partition("/")[0] for name in kept} == {"step-000000", "step-000002"}
    assert all(value.isfinite().all() for value in kept.values())


@pytest.mark.parametrize("limit", [0, 3])
def test_skips_in_a_row_end_the_run_with_the_tensors_name(model, tmp_path, monkeypatch, limit):
    def poisoned(policy, *arguments):
        policy.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
        return update(policy, *arguments)

    monkeypatch.setattr(loop, "update", poisoned)
    optimizer = Optimizer(learning_rate=1e-2, max_nonfinite=limit)
    config = settings(tmp_path, model, optimizer=optimizer)
    with pytest.raises(
        ValueError,
        match=rf"step {1 + limit // 2}: the gradient of lm_head.weight is not finite: {limit + 1} "
        rf"updates in a row are skipped, and optimizer.max_nonfinite is {limit}; go back to ",
    ):
        train(config)
    kept = read_state(config)
    assert all(
        torch.equal(kept[f"step-000000/{name}"], value)
        for name, value in read_whole(Path(model)).items()
    )


def test_a_good_update_starts_the_count_of_skips_again():
    guard = Guard(limit=2)
    for problem in ("a", "a", None, "a", "b"):
        guard.count(problem)
    with pytest.raises(NotFinite, match=r"^c: 3 updates in a row are skipped"):
        guard.count("c")


STATISTICS = ("logprob", "entropy", "sampler_logprob", "reward", "advantage")


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, math.nan) for name in STATISTICS), ("sampler_logprob", -math.inf)],
)
def test_a_statistic_that_is_not_finite_skips_its_step(model, tmp_path, monkeypatch, name, value):
    """In step 2 of 3; the other steps train, and nothing of it is in the end."""
    check = loop.check_statistics

    def poison(policy, batch, entropy_T, *arguments):
        step = len(seen)
        seen.append(policy.model.lm_head.weight.detach().clone())
        if step == 1:
            rollouts = batch.rollouts
            entropy_T = entropy_T.clone()
            named = (batch.old_logprob_T, entropy_T, rollouts.sampler_logprob_T)
            tensor = dict(
                zip(STATISTICS, (*named, rollouts.reward_B, batch.advantage_B), strict=True)
            )[name]
            tensor[-1] = value
        return check(policy, batch, entropy_T, *arguments)

    seen = []
    monkeypatch.setattr(loop, "check_statistics", poison)
    algorithm = Algorithm(min_groups=1, max_rounds=2, entropy_source="old")
    config = settings(tmp_path, model, steps=3, algorithm=algorithm)
    train(config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row.get(f"skipped/nonfinite_{name}", 0) for row in rows] == [0, 0, 1, 0]
    assert "loss" not in rows[2]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert all(value.isfinite().all() for value in read_state(config).values())


@pytest.mark.parametrize("source", ["old", "current"])
def test_an_update_without_a_selected_token_changes_nothing(source):
    algorithm = Algorithm(entropy_source=source, fraction=0.5)
    assert skipped(algorithm, **NO_TOKEN)["skipped/no_tokens"] == 1


def test_an_update_without_an_advantage_changes_nothing():
    assert skipped(advantage_B=torch.zeros_like)["skipped/no_advantage"] == 1


def test_a_loss_that_is_not_finite_changes_nothing(monkeypatch):
    """Though its gradient is."""
    plain, calls = trainer.update._loss, []

    def infinite(*arguments):
        loss, metrics = plain(*arguments)
        calls.append(loss)
        return loss + (math.inf if len(calls) > 1 else 0), metrics

    monkeypatch.setattr(trainer.update, "_loss", infinite)
    metrics = skipped()
    assert metrics["skipped/nonfinite_loss"] == 1
    assert metrics["skipped/nonfinite_gradient"] == 0


def test_mini_batches_without_tokens_are_no_updates(model, tmp_path):
    """A tiny fraction keeps one token of a step, so three of four mini-batches are empty."""
    config = settings(
        tmp_path,
        model,
        algorithm=Algorithm(fraction=1e-9, min_groups=4, max_rounds=20),
        optimizer=Optimizer(learning_rate=1e-2, mini_batches=4),
    )
    train(config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    updated = [row for row in rows if "loss" in row]
    assert len(updated) >= 4
    assert sum(row["skipped/no_tokens"] for row in updated) >= 2 * len(updated)
    made = sum(4 - row["skipped/no_tokens"] for row in updated)
    last = Path(config.root) / "run" / "checkpoints" / "step-000006"
    assert json.loads((last / "state.json").read_text())["updates"] == made
    steps = {
        float(value)
        for name, value in read_state(config).items()
        if name.startswith("step-000006") and name.endswith(".step")
    }
    assert steps == {made}


@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight"])
def test_a_model_that_is_not_finite_does_not_start(tmp_path, where):
    folder = save_folder(tmp_path / "model")
    built = build_model()
    with torch.no_grad():
        built.get_parameter(where).view(-1)[-1] = math.nan
    built.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{where} is not finite as it is read from .*model$"):
        train(settings(tmp_path, folder))
    assert not (tmp_path / "run").exists()


def test_a_warm_start_that_is_not_finite_is_told_in_a_line():
    model, tokenizer = build_tiny(0)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = math.nan
    settings = WarmStart(steps=2, traces=8, batch_size=4)
    with pytest.raises(
        ValueError, match=r"step 1 of the warm start: model.layers.1.mlp.up_proj.weight or its grad"
    ):
        warm_start(model, tokenizer, make_task(Data(), 0), settings, 0)


def test_the_engines_copy_is_finite():
    policy = build_policy()
    engine = TransformersEngine(policy, 8, torch.bfloat16)
    engine.update_weights(policy.weights())
    with torch.no_grad():
        policy.model.lm_head.weight[3, 3] = math.inf
    with pytest.raises(NotFinite, match=r"lm_head.weight is not finite in the engine's copy"):
        engine.update_weights(policy.weights())


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_no_checkpoint_holds_what_is_not_finite(tmp_path, part):
    policy, optimizer, _ = moved_policy()
    weight = policy.model.lm_head.weight
    poisoned = weight if part == "weight" else optimizer.state[weight]["exp_avg_sq"]
    with torch.no_grad():
        poisoned[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"lm_head\.weight\S* is not finite so no checkpoint"):
        checkpoint.save(tmp_path, policy, optimizer, Progress(), 2, ALONE)
    assert not list(tmp_path.rglob("*.safetensors"))


def _two_ranks():
    """What each of two says where one shard is poisoned, and of a batch without a token."""
    with join("cpu") as ranks:
        policy = build_policy(spread=0.2)
        batch, _ = on_policy(policy)
        shard(policy, policy.model, ranks, None)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
        update(policy, optimizer, batch, configure(), ranks)
        nothing = dataclasses.replace(
            batch, selected_T=batch.selected_T & False, threshold=torch.tensor(1e9)
        )
        said = []
        for source in ("old", "current"):
            config = configure(Algorithm(entropy_source=source))
            metrics, _ = update(policy, optimizer, nothing, config, ranks)
            said.append(metrics["skipped/no_tokens"])
        said.append(optimizer.state[policy.model.lm_head.weight]["step"].item())
        if ranks.first:
            policy.model.lm_head.weight.to_local().data[0, 0] = math.nan
        try:
            check_finite(policy.model.named_parameters(), ranks, "here")
        except NotFinite as error:
            said.append(str(error))
        return said


def test_ranks_decide_alike(tmp_path):
    said = run_ranks(2, _two_ranks, tmp_path / "ranks")
    assert said == [[1.0, 1.0, 1.0, "lm_head.weight is not finite here"]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_the_first_that_is_not_finite_is_named(poison, dtype):
    largest = torch.finfo(dtype).max
    ones = [(f"w{i}", torch.full((3, 3), largest, dtype=dtype)) for i in range(600)]
    assert first_nonfinite([*ones, ("n", torch.tensor(3)), ("e", torch.ones(0))]) is None
    ones[555][1][0, 0] = math.nan
    assert first_nonfinite(ones) == "w555"
    ones[500][1][2, 2] = poison
    assert first_nonfinite(ones) == "w500"
