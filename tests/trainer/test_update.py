"""One optimizer step: the gradient of the dense objective, however it is split."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import entropy_kernels as ek
from entropy_kernels import reference
from tests.trainer.small import build_policy, load_policy, save_folder, sequences
from tests.trainer.update_cases import (
    ALONE,
    CONFIG,
    TEMPERATURE,
    Recorder,
    configure,
    distance,
    gradients,
    off_policy,
    on_policy,
    roll,
    step,
)
from trainer.config import Algorithm, Model
from trainer.metrics import Meter
from trainer.update import TIE, score, update

OBJECTIVES = [
    Algorithm(loss_type=loss_type, denominator=denominator, entropy_source=source, dual_clip=clip)
    for loss_type in ("dapo", "grpo")
    for denominator in ("selected", "all")
    for source, clip in (("old", None), ("current", 1.5))
]
IDS = [f"{a.loss_type}-{a.denominator}-{a.entropy_source}" for a in OBJECTIVES]


def dense(policy, batch, algorithm):
    """Loss and gradients of the specification: fp64, each sequence alone and unpadded, through the
    model's own logits, one autograd graph for all."""
    model = copy.deepcopy(policy.model).double()
    rollouts, logprobs = batch.rollouts, []
    for prompt, response in sequences(rollouts):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(1).gather(1, response[:, None]).squeeze(1)
        logprobs.append(logp)

    def padded(x_T):
        return pad_sequence(rollouts.split(x_T), batch_first=True)

    selected_BL, mask_BL = padded(batch.selected_T), padded(torch.ones_like(batch.selected_T))
    loss = reference.ratio_loss(
        padded(torch.cat(logprobs)),
        padded(batch.old_logprob_T.double()),
        batch.advantage_B.double()[:, None].expand(mask_BL.shape),
        mask_BL,
        selected_BL,
        loss_type=algorithm.loss_type,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        denominator=algorithm.denominator,
    )
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("algorithm", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_is_the_gradient_of_the_dense_objective(family, algorithm):
    policy = build_policy(family, spread=0.2)
    batch = off_policy(policy)
    loss, want = dense(policy, batch, algorithm)
    got, metrics = gradients(policy, batch, configure(algorithm))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert distance(got, want) < 1e-5
    norm = math.sqrt(sum(float(g.square().sum()) for g in want))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("gemma2", "eager"), ("cohere", "eager"), ("granite", "sdpa"), ("phi", "sdpa")],
)
def test_every_kind_of_head_has_the_dense_gradient(family, attention):
    policy = build_policy(family, spread=0.2, attention=attention)
    batch = off_policy(policy)
    _, want = dense(policy, batch, CONFIG.algorithm)
    got, _ = gradients(policy, batch, configure())
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("algorithm", OBJECTIVES, ids=IDS)
def test_micro_batches_change_nothing(algorithm):
    """One row at a time, five, or all at once; a micro-batch may have no selected token."""
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    batch.selected_T[batch.rollouts.places(torch.tensor([3]))] = False
    width = int(batch.rollouts.length_B.max())
    whole, metrics = gradients(policy, batch, configure(algorithm))
    for rows in (1, 5):
        parts, other = gradients(policy, batch, configure(algorithm, tokens=rows * width))
        assert distance(parts, whole) < 1e-6
        assert other.keys() == metrics.keys()
        assert other == pytest.approx(metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("source", ["old", "current"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_later_micro_batches_add_to_the_head_s_gradient_where_it_is(family, source, monkeypatch):
    """The first one has none yet, unless the head shares the embedding's."""
    policy = build_policy(family, spread=0.2)
    batch = off_policy(policy)
    algorithm = Algorithm(entropy_source=source)
    weight = policy.model.get_output_embeddings().weight
    seen = []
    called = ek.high_entropy_policy_loss

    def watched(*arguments, **options):
        main_grad = options["backend"].main_grad
        seen.append((main_grad is not None, main_grad is weight.grad))
        return called(*arguments, **options)

    monkeypatch.setattr(ek, "high_entropy_policy_loss", watched)
    whole, _ = gradients(policy, batch, configure(algorithm))
    seen.clear()
    parts, _ = step(policy, batch, configure(algorithm, tokens=30))
    assert len(seen) > 2
    tied = policy.model.get_input_embeddings().weight is weight
    assert seen == [(tied, True)] + [(True, True)] * (len(seen) - 1)
    assert distance(parts, whole) < 1e-6


def test_the_objective_counts_its_tokens():
    """Rows of the head, rows with a gradient, clipped shares and fractions, by hand."""
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    new_T = score(policy, batch.rollouts, CONFIG, ALONE).logprob_T
    _, metrics = gradients(policy, batch, configure(tokens=50))
    selected = batch.selected_T
    ratio = (new_T - batch.old_logprob_T).exp()
    advantage = batch.advantage_B.repeat_interleave(batch.rollouts.response_length_B)
    low = selected & (advantage < 0) & (ratio < 0.8)
    high = selected & (advantage > 0) & (ratio > 1.28)
    active = selected & (advantage != 0) & ~low & ~high
    assert low.any()
    assert high.any()
    assert metrics["head/rows"] == len(selected)
    assert metrics["head/active_rows"] == active.sum()
    assert metrics["clip/low"] == pytest.approx(float(low.sum() / selected.sum()))
    assert metrics["clip/high"] == pytest.approx(float(high.sum() / selected.sum()))
    assert metrics["ratio/mean"] == pytest.approx(float(ratio[selected].mean()), rel=1e-5)
    assert metrics["ratio/max"] == pytest.approx(float(ratio[selected].max()), rel=1e-5)
    fraction = selected.sum() / len(selected)
    assert metrics["entropy/selected_fraction"] == pytest.approx(float(fraction))
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("source", ["old", "current"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_first_mini_batch_has_ratio_1(family, source, tmp_path):
    """Loaded from a folder: GPT-2's own configuration has dropout, which would be noise here."""
    policy = load_policy(Model(path=save_folder(tmp_path, family)))
    batch, _ = on_policy(policy)
    _, metrics = gradients(policy, batch, configure(Algorithm(entropy_source=source), tokens=50))
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["ratio/max"] == pytest.approx(1, abs=1e-5)
    assert (metrics["clip/low"], metrics["clip/high"]) == (0, 0)
    assert abs(metrics["kl/k1"]) < 1e-6
    assert metrics["kl/k3"] < 1e-9


@pytest.mark.parametrize("source", ["old", "current"])
def test_fraction_1_trains_on_all_tokens(source):
    """Also on those whose entropy has since fallen below the lowest of the old policy."""
    policy = build_policy(spread=0.2)
    config = configure(Algorithm(fraction=1.0, entropy_source=source))
    batch, _ = on_policy(policy, config)
    batch = dataclasses.replace(batch, threshold=batch.threshold + 0.5)
    _, metrics = gradients(policy, batch, config)
    assert metrics["entropy/selected_fraction"] == 1


def test_entropies_tie_with_the_threshold_up_to_rounding():
    """The token at the threshold is selected, though its entropy is computed a second time."""
    policy = build_policy(spread=0.2)
    batch, _ = on_policy(policy)
    near = dataclasses.replace(batch, threshold=batch.threshold * (1 + TIE / 2))
    _, metrics = gradients(policy, near, configure(Algorithm(entropy_source="current"), tokens=20))
    share = float(batch.selected_T.float().mean())
    assert metrics["entropy/selected_fraction"] == pytest.approx(share)


def test_scores_are_those_of_the_dense_model_and_set_the_threshold():
    policy = build_policy()
    rollouts = roll(policy)
    logprob_T, entropy_T, threshold, _ = score(policy, rollouts, configure(tokens=40), ALONE)
    logprobs, entropies = [], []
    for prompt, response in sequences(rollouts):
        with torch.no_grad():
            z = policy.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (z.double() / TEMPERATURE).log_softmax(1)
        entropies.append(-(logp.exp() * logp).sum(1))
        logprobs.append(logp.gather(1, response[:, None]).squeeze(1))
    for got_T, want_T in ((logprob_T, torch.cat(logprobs)), (entropy_T, torch.cat(entropies))):
        torch.testing.assert_close(got_T.double(), want_T, rtol=1e-5, atol=1e-5)
    want = reference.entropy_threshold(torch.cat(entropies), None, CONFIG.algorithm.fraction)
    assert float(threshold) == pytest.approx(float(want), rel=1e-5)


def test_a_frozen_head_stays():
    """Its gradient is not taken; the others' do not notice."""
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    whole, _ = gradients(policy, batch, configure())
    policy.model.lm_head.weight.requires_grad_(False)
    frozen, _ = gradients(policy, batch, configure())
    names = [name for name, _ in policy.model.named_parameters()]
    for name, with_head, without in zip(names, whole, frozen, strict=True):
        if name == "lm_head.weight":
            assert with_head.any()
            assert not without.any()
        else:
            assert torch.equal(with_head, without)


def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path):
    path = save_folder(tmp_path)
    plain = load_policy(Model(path=path))
    saving = load_policy(Model(path=path, gradient_checkpointing=True))
    batch = off_policy(plain)
    want, _ = gradients(plain, batch, configure())
    passes = []
    norm = saving.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: passes.append(1))
    optimizer = Recorder(saving)
    update(saving, optimizer, batch, configure(), ALONE)
    assert len(passes) == 2
    got = [optimizer.seen[id(p)] for p in saving.model.parameters()]
    assert distance(got, want) < 1e-6


def test_the_gradient_is_clipped():
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    whole, metrics = gradients(policy, batch, configure())
    norm = metrics["grad_norm"]
    clipped, _ = gradients(policy, batch, configure(grad_clip=norm / 4))
    assert distance(clipped, [g / 4 for g in whole]) < 1e-4


def test_a_gradient_that_is_not_finite_makes_no_step():
    policy = build_policy()
    batch = off_policy(policy)
    next(policy.model.parameters()).register_hook(lambda grad: grad * torch.nan)
    before = copy.deepcopy(policy.model.state_dict())
    optimizer = Recorder(policy)
    metrics, _ = update(policy, optimizer, batch, configure(), ALONE)
    assert optimizer.seen is None
    assert metrics["skipped/nonfinite_gradient"] == 1
    assert not math.isfinite(metrics["grad_norm"])
    assert all(torch.equal(policy.model.state_dict()[name], before[name]) for name in before)
    assert all(p.grad is None for p in policy.model.parameters())


def test_bf16_weights():
    """Close to the fp32 gradient of the same weights."""
    policy = build_policy(spread=0.2)
    policy.model.to(torch.bfloat16)
    batch, _ = on_policy(policy)
    got, metrics = gradients(policy, batch, configure(Algorithm(fraction=1.0)))
    exact = copy.deepcopy(policy)
    exact.model.float()
    want, _ = gradients(exact, batch, configure(Algorithm(fraction=1.0)))
    assert metrics["skipped/nonfinite_gradient"] == 0
    assert got[0].dtype == torch.bfloat16
    assert distance(got, want) < 16 * torch.finfo(torch.bfloat16).eps


def test_meter_joins_parts():
    meter = Meter()
    meter.add({"clip/low": 0.5, "ratio/max": 2.0, "head/rows": 3, "skipped/x": 1}, weight=1)
    meter.add({"clip/low": 0.1, "ratio/max": 1.5, "head/rows": 4, "skipped/x": 0}, weight=3)
    want = {"clip/low": 0.2, "ratio/max": 2.0, "head/rows": 7, "skipped/x": 1}
    assert meter.result() == pytest.approx(want)


@pytest.mark.parametrize("source", ["old", "current"])
@pytest.mark.parametrize(
    ("correction", "ratio", "factor"), [("tis", 1.5, 1.5), ("tis", 3.0, 2.0), ("mis", 3.0, 0.0)]
)
def test_multiplies_the_gradient_with_the_correction_of_the_sampler(
    correction, ratio, factor, source
):
    policy = build_policy()
    batch = off_policy(policy)
    plain, _ = gradients(policy, batch, configure(Algorithm(entropy_source=source)))
    sampler_logprob_T = batch.old_logprob_T - math.log(ratio)
    rollouts = dataclasses.replace(batch.rollouts, sampler_logprob_T=sampler_logprob_T)
    config = configure(Algorithm(entropy_source=source, correction=correction), tokens=64)
    got, _ = gradients(policy, dataclasses.replace(batch, rollouts=rollouts), config)
    if factor == 0:
        assert all(not g.any() for g in got)
    else:
        assert distance(got, [factor * g for g in plain]) < 1e-5
