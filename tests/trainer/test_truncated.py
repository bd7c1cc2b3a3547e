"""Training on rollouts of a truncated sampler: over each token's kept set, in score and update."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from entropy_kernels import reference
from tests.trainer.small import (  # noqa: F401
    EVEN,
    build_policy,
    metrics,
    on_even,
    sampled,
    save_folder,
    sequences,
    settings,
)
from tests.trainer.update_cases import (
    ALONE,
    CONFIG,
    TEMPERATURE,
    configure,
    distance,
    gradients,
)
from trainer.advantages import group_advantages
from trainer.batch import Batch
from trainer.checkpoint.sharded import read_whole
from trainer.config import Algorithm, Truncation
from trainer.train import train
from trainer.update import score

SOURCES = [("sampler", "sampler"), ("recomputed", "old"), ("recomputed", "sampler")]


def truncated(policy, **truncation):
    """Twelve responses, each token drawn from what `truncation` leaves."""
    policy.model.generation_config.eos_token_id = [1, 4]
    options = {"max_new_tokens": 8, "temperature": TEMPERATURE}
    return sampled(policy, EVEN[:3], truncation=Truncation(**truncation), **options)


def dense(policy, rollouts):
    """Log-probs and entropies [T] over the sets, by the model's own logits with -inf outside of
    them, in fp64 with their graph; and the model's parameters."""
    model = copy.deepcopy(policy.model).double()
    sets, logits = rollouts.kept, []
    for prompt, response in sequences(rollouts):
        logits.append(model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1])
    z = torch.cat(logits) / TEMPERATURE
    inside = torch.zeros_like(z, dtype=torch.bool)
    for t, (begin, end) in enumerate(zip(sets.offsets, sets.offsets[1:], strict=False)):
        inside[t, sets.token_ids[begin:end]] = True
    logp = z.masked_fill(~inside, -torch.inf).log_softmax(1)
    entropy_T = -torch.where(inside, logp.exp() * logp, 0.0).sum(1)
    logprob_T = logp.gather(1, rollouts.response_T[:, None]).squeeze(1)
    return logprob_T, entropy_T, list(model.parameters())


def batch_of(policy, rollouts, config=CONFIG):
    """A batch whose ratios are off, with some clipped on each side; tokens by their entropies."""
    found = score(policy, rollouts, config, ALONE)
    noise_T = 0.3 * torch.randn(found.logprob_T.shape, generator=torch.Generator().manual_seed(1))
    advantage_B = group_advantages(torch.linspace(-1, 1, 12).square(), rollouts.group_B)
    ordered = found.entropy_T.sort().values
    middle = int(0.6 * len(ordered))
    threshold = (ordered[middle] + ordered[middle + 1]) / 2
    old_T = (found.logprob_T + noise_T).clamp_max(0)
    return Batch(rollouts, advantage_B, old_T, found.entropy_T >= threshold, threshold)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens", [20, 10**6])
def test_scores_are_over_the_sets(family, tokens):
    policy = build_policy(family)
    rollouts = truncated(policy, top_p=0.7)
    sizes = rollouts.kept.sizes
    assert (sizes == 1).any()
    assert (sizes > 2).any()
    found = score(policy, rollouts, configure(tokens=tokens), ALONE)
    logprob_T, entropy_T, _ = dense(policy, rollouts)
    torch.testing.assert_close(found.logprob_T.double(), logprob_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy_T.double(), entropy_T, rtol=1e-5, atol=1e-5)
    # The sampler has told the same.
    torch.testing.assert_close(found.logprob_T, rollouts.sampler_logprob_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy_T, rollouts.sampler_entropy_T, rtol=1e-5, atol=1e-5)
    some_T = found.entropy_T > found.entropy_T.median()
    alone = score(policy, rollouts, configure(tokens=tokens), ALONE, some_T)
    torch.testing.assert_close(alone.logprob_T[some_T], found.logprob_T[some_T])
    assert not alone.logprob_T[~some_T].any()


@pytest.mark.parametrize("source", ["sampler", "current"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_gradient_is_that_of_the_masked_logits(source, loss_type):
    policy = build_policy("qwen3", spread=0.4)
    rollouts = truncated(policy, top_k=3)
    batch = batch_of(policy, rollouts)
    logprob_T, _, parameters = dense(policy, rollouts)

    def padded(x_T):
        return pad_sequence(rollouts.split(x_T), batch_first=True)

    mask_BL = padded(torch.ones_like(batch.selected_T))
    loss = reference.ratio_loss(
        padded(logprob_T),
        padded(batch.old_logprob_T.double()),
        batch.advantage_B.double()[:, None].expand(mask_BL.shape),
        mask_BL,
        padded(batch.selected_T),
        loss_type=loss_type,
        clip_low=0.2,
        clip_high=0.28,
        denominator="selected",
    )
    loss.backward()
    algorithm = Algorithm(loss_type=loss_type, entropy_source=source)
    got, found = gradients(policy, batch, configure(algorithm, tokens=30))
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7)
    assert distance(got, [p.grad for p in parameters]) < 1e-5
    without = replace(batch, rollouts=replace(rollouts, kept=None))
    other, _ = gradients(policy, without, configure(algorithm))
    assert distance(other, got) > 1e-3


def test_sets_of_one_token_have_no_gradient_and_are_counted():
    """Whether they are selected matters to the denominator alone."""
    policy = build_policy("qwen3", spread=0.4)
    rollouts = truncated(policy, top_p=0.5)
    batch = batch_of(policy, rollouts)
    single_T = rollouts.kept.sizes == 1
    assert 0.2 < single_T.float().mean() < 1
    algorithm = Algorithm(fraction=1.0, denominator="all")
    # A ratio of 1, so that none is clipped.
    old_T = torch.where(single_T, 0.0, batch.old_logprob_T)
    everyone = replace(batch, old_logprob_T=old_T, selected_T=torch.ones_like(single_T))
    want, found = gradients(policy, everyone, configure(algorithm))
    got, _ = gradients(policy, replace(everyone, selected_T=~single_T), configure(algorithm))
    assert found["head/rows"] == len(single_T)
    assert found["entropy/selected_fraction"] == 1
    assert distance(got, want) < 1e-6
    alone, found = gradients(policy, replace(everyone, selected_T=single_T), configure(algorithm))
    assert found["grad_norm"] == 0
    assert not any(x.any() for x in alone)


def test_a_batch_of_single_tokens_changes_no_weight():
    policy = build_policy("qwen3")
    rollouts = truncated(policy, top_k=1)
    assert (rollouts.kept.sizes == 1).all()
    _, found = gradients(policy, batch_of(policy, rollouts), configure(Algorithm(fraction=1.0)))
    assert (found["grad_norm"], found["entropy/selected_mean"]) == (0, 0)


@pytest.mark.parametrize("rollout", [{"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.2}])
def test_truncated_rollouts_train_alike_by_all_sources(tmp_path, rollout):
    model = save_folder(tmp_path / "model", "qwen3", spread=0.4)
    config = settings(tmp_path, model, steps=2, checkpoint_every=2)
    config = replace(
        config,
        rollout=replace(config.rollout, **rollout),
        optimizer=replace(config.optimizer, learning_rate=1e-4),
    )
    last = []
    for old, entropy in SOURCES:
        algorithm = Algorithm(
            min_groups=1, max_rounds=2, old_logprob=old, entropy_source=entropy, compare_every=1
        )
        named = replace(config, name=f"{old}-{entropy}", algorithm=algorithm)
        train(named)
        rows = metrics(tmp_path / named.name)[1:]
        last.append((rows, read_whole(tmp_path / named.name / "checkpoints" / "step-000002")))
    for rows, weights in last:
        assert distance(weights.values(), last[0][1].values()) < 1e-6
        for row, other in zip(rows, last[0][0], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=2e-6)
            assert row["entropy/mean"] == pytest.approx(other["entropy/mean"], rel=1e-5)
            assert row["mask/overlap"] == 1
            assert row["mismatch/all_max_ratio"] == pytest.approx(1, abs=1e-4)
            assert row["skipped/nonfinite_gradient"] == row["skipped/nonfinite_loss"] == 0
