"""The entropy bonus in training: its gradient, its coefficient when a run resumes, its control."""

import copy
import dataclasses
import json

import pytest
import torch

from tests.trainer.small import build_policy, elsewhere, metrics, on_even, sequences, settings  # noqa: F401
from tests.trainer.test_resume import crash
from tests.trainer.test_train import assert_same_run
from tests.trainer.update_cases import (
    ALONE,
    TEMPERATURE,
    Recorder,
    configure,
    distance,
    off_policy,
)
from trainer.config import Algorithm, Eval
from trainer.train import train
from trainer.update import update

COEF = 0.7
OBJECTIVES = [
    Algorithm(loss_type=loss_type, denominator=denominator, entropy_over=over, entropy_coef=COEF)
    for loss_type in ("dapo", "grpo")
    for denominator in ("selected", "all")
    for over in ("selected", "all")
]
OBJECTIVES += [
    Algorithm(denominator="all", entropy_over=over, entropy_coef=COEF, entropy_source="current")
    for over in ("selected", "all")
]
IDS = [f"{a.loss_type}-{a.denominator}-{a.entropy_over}-{a.entropy_source}" for a in OBJECTIVES]


def gradients(policy, batch, algorithm, coef, tokens=10**6):
    policy = copy.deepcopy(policy)
    optimizer = Recorder(policy)
    config = configure(algorithm, tokens)
    found, _ = update(policy, optimizer, batch, config, ALONE, None, coef)
    return [optimizer.seen[id(p)] for p in policy.model.parameters()], found


def mean_entropy(policy, batch, algorithm):
    """The written mean over the bonus's tokens, in fp64 and with its graph, and its model."""
    model = copy.deepcopy(policy.model).double()
    parts, kept = [], batch.rollouts.split(batch.selected_T)
    for (prompt, response), selected in zip(sequences(batch.rollouts), kept, strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(1)
        over = selected if algorithm.entropy_over == "selected" else torch.ones_like(selected)
        counted = selected if algorithm.denominator == "selected" else torch.ones_like(selected)
        counted = counted if algorithm.entropy_over == "selected" else over
        parts.append((-(logp.exp() * logp).sum(1)[over], int(counted.sum())))
    if algorithm.loss_type == "grpo":
        return sum(part.sum() / max(count, 1) for part, count in parts) / len(parts), model
    return torch.cat([part for part, _ in parts]).sum() / sum(count for _, count in parts), model


@pytest.mark.parametrize("algorithm", OBJECTIVES, ids=IDS)
def test_its_gradient_is_that_of_the_mean_entropy(algorithm):
    policy = build_policy("qwen3", spread=0.2)
    batch = off_policy(policy)
    without, plain = gradients(policy, batch, dataclasses.replace(algorithm, entropy_coef=0.0), 0.0)
    found, told = gradients(policy, batch, algorithm, COEF)
    mean, model = mean_entropy(policy, batch, algorithm)
    (-COEF * mean).backward()
    want = [p.grad for p in model.parameters()]
    assert distance([a - b for a, b in zip(found, without, strict=True)], want) < 1e-4
    assert plain["loss"] - told["loss"] == pytest.approx(COEF * float(mean.detach()), rel=1e-4)
    assert told["entropy/coefficient"] == COEF
    assert told["entropy/bonus"] == pytest.approx(COEF * told["entropy/of_bonus"])
    if (algorithm.loss_type, algorithm.denominator) == ("dapo", "selected"):
        assert told["entropy/of_bonus"] == pytest.approx(float(mean.detach()), rel=1e-5)
    assert not {"entropy/of_bonus", "entropy/coefficient", "sum/entropy"} & plain.keys()


@pytest.mark.parametrize("algorithm", OBJECTIVES, ids=IDS)
def test_micro_batches_change_nothing(algorithm):
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    batch.selected_T[batch.rollouts.places(torch.tensor([3]))] = False
    width = int(batch.rollouts.length_B.max())
    whole, want = gradients(policy, batch, algorithm, COEF)
    for rows in (1, 5):
        parts, got = gradients(policy, batch, algorithm, COEF, rows * width)
        assert distance(parts, whole) < 1e-6
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("over", ["selected", "all"])
def test_a_coefficient_of_0_measures_and_changes_nothing(over):
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    algorithm = Algorithm(entropy_target=0.1, entropy_over=over)
    without, _ = gradients(policy, batch, Algorithm(), 0.0)
    found, told = gradients(policy, batch, algorithm, 0.0)
    assert distance(found, without) < 1e-6
    mean, _ = mean_entropy(policy, batch, algorithm)
    assert told["entropy/of_bonus"] == pytest.approx(float(mean.detach()), rel=1e-5)


def test_a_bonus_is_something_to_learn_without_advantages():
    policy = build_policy(spread=0.2)
    batch = dataclasses.replace(off_policy(policy), advantage_B=torch.zeros(12))
    _, told = gradients(policy, batch, Algorithm(entropy_coef=COEF), COEF)
    assert told["grad_norm"] > 0
    nothing, _ = update(policy, Recorder(policy), batch, configure(), ALONE)
    assert nothing["skipped/no_advantage"] == 1


WRONG = {
    "both": ({"entropy_target": 0.2, "entropy_band": (0.1, 0.2)}, "give one of them, got 0.2"),
    "order": ({"entropy_band": (0.3, 0.2)}, r"entropy_band must have the lower.*\(0.3, 0.2\)"),
    "bounds": ({"entropy_bounds": (1.0, 0.0)}, r"entropy_bounds must have.*\(1.0, 0.0\)"),
    "delta": ({"entropy_delta": -0.1}, "entropy_delta must be at least 0; got -0.1"),
    "target": ({"entropy_target": -0.1}, "entropy_target must be at least 0; got -0.1"),
    "outside": ({"entropy_target": 0.2, "entropy_coef": 2.0}, "entropy_bounds.*got 2.0"),
    "unknown": (
        {"entropy_coef": 0.1, "entropy_over": "all", "entropy_source": "current"},
        "entropy_over=\"all\" needs the number.*got 'current' and 'selected'",
    ),
    "weighed": (
        {"entropy_coef": 0.1, "entropy_over": "all", "which": "nat-random"},
        "no meaning where a rule weighs tokens, as which='nat-random' does",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Algorithm(**options)


@pytest.mark.parametrize("what", ["weight_T", "kept_length_B"])
def test_a_bonus_over_all_tokens_is_refused_where_a_rule_leaves_some_out(what):
    """As a function of the user's may."""
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    values = {"weight_T": torch.ones(len(batch.selected_T)), "kept_length_B": torch.ones(12).long()}
    batch = dataclasses.replace(batch, **{what: values[what]})
    algorithm = Algorithm(entropy_coef=COEF, entropy_over="all")
    with pytest.raises(ValueError, match="no meaning where the rule weighs tokens or cuts"):
        gradients(policy, batch, algorithm, COEF)


HELD = Algorithm(
    min_groups=1, max_rounds=2, fraction=1.0, entropy_band=(2.65, 2.7), entropy_delta=0.05
)


@pytest.fixture(scope="module")
def controlled(model, tmp_path_factory):
    """A run of six steps whose coefficient moves, and its settings."""
    config = settings(tmp_path_factory.mktemp("controlled"), model, algorithm=HELD)
    # A row of metrics is then that of one update.
    optimizer = dataclasses.replace(config.optimizer, mini_batches=1)
    config = dataclasses.replace(config, optimizer=optimizer)
    train(config)
    return config.folder, config


def test_a_run_with_control_goes_on_with_the_same_numbers(controlled, tmp_path):
    folder, config = controlled
    config = elsewhere(config, tmp_path)
    crash(config)
    state = json.loads((config.folder / "checkpoints/step-000002/state.json").read_text())
    assert state["entropy"].keys() == {"coef", "entropy"}
    train(config)
    assert_same_run(tmp_path / "run", folder)
    coefs = [row["entropy/coefficient"] for row in metrics(folder) if "entropy/bonus" in row]
    assert len(set(coefs)) > 2


def test_the_state_is_that_of_the_written_rule(controlled):
    """The coefficient of each update follows from the entropies of those before."""
    folder, config = controlled
    low, high = config.algorithm.entropy_band
    coef, rows = 0.0, [row for row in metrics(folder) if "entropy/bonus" in row]
    assert len(rows) > 3
    for row in rows:
        assert row["entropy/coefficient"] == pytest.approx(coef)
        entropy = row["entropy/of_bonus"]
        coef = coef + 0.05 * ((entropy < low) - (entropy > high))
        coef = min(max(coef, 0.0), 1.0)


@pytest.mark.slow
def test_the_entropy_ends_in_the_band_and_leaves_it_without_control(model, tmp_path):
    last, held = {}, {"entropy_band": (1.8, 2.4), "entropy_bounds": (0.0, 1.0)}
    for name, control in {"held": held | {"entropy_delta": 0.1}, "alone": {}}.items():
        algorithm = Algorithm(min_groups=1, max_rounds=2, fraction=1.0, **control)
        config = settings(tmp_path, model, name=name, steps=45, algorithm=algorithm)
        config = dataclasses.replace(config, eval=Eval(45, 4), checkpoint_every=45)
        train(config)
        rows = metrics(config.folder)
        last[name] = [row["entropy/mean"] for row in rows if "entropy/mean" in row][-8:]
    assert 1.8 <= sum(last["held"]) / 8 <= 2.4
    assert all(1.6 <= entropy <= 2.5 for entropy in last["held"])
    assert all(entropy < 1.6 for entropy in last["alone"])
