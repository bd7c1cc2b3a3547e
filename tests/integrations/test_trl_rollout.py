"""What a rollout_func of TRL's knows of its tokens reaches the loss, and is right there."""

import math
import os
import statistics
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("trl", reason="the adapter is for TRL")

from trl.trainer.grpo_trainer import GRPOTrainer

from entropy_kernels.integrations import _trl_rollout, _trl_step
from entropy_kernels.integrations import trl as adapter
from entropy_kernels.integrations.trl import patch_trl
from tests.integrations.counted import Counted
from tests.integrations.rollouts import ALL_FIELDS, SampleOneByOne, as_supports, build, run
from tests.integrations.small_grpo import LOSS_TYPES, columns, difference
from tests.marks import sampled
from tests.processes import spawn
from tests.trainer.small import WORDS
from tests.trainer.worlds import meeting, place

# Other projects' deprecations are theirs.
pytestmark = [sampled(0.2), pytest.mark.filterwarnings("ignore")]

D, V = 16, len(WORDS)
FIVE_DIGITS = 1e-5
TOP = 3


@pytest.fixture(autouse=True)
def _undone():
    yield
    if adapter._in_force is not None:
        adapter._in_force[1].undo()


class Kept:
    """Each loss's micro-batch, its mask, the tokens selected and those with a gradient.

    It stands around TRL's own methods, so it comes before the patch.
    """

    def __init__(self, monkeypatch, owner=GRPOTrainer, name="get_high_entropy_mask"):
        self.inputs, self.masks, self.keeps, self.active = [], [], [], []
        choose, compute = getattr(owner, name), GRPOTrainer._compute_loss

        def chosen(*args):
            self.keeps.append(choose(*args))
            return self.keeps[-1]

        def counted(trainer, model, inputs):
            self.inputs.append(inputs)
            self.masks.append(inputs["completion_mask"].bool())
            loss = compute(trainer, model, inputs)
            self.active.append(self.keeps[-1] & (inputs["advantages"] != 0)[:, None])
            return loss

        monkeypatch.setattr(owner, name, chosen)
        monkeypatch.setattr(GRPOTrainer, "_compute_loss", counted)

    @staticmethod
    def counts(masks):
        return [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_are_those_of_the_current_policys_entropies(tmp_path, loss_type):
    """TRL's own run, and one whose mask comes from the sampler, which is the same policy."""
    want = run(tmp_path, nullcontext(), loss_type=loss_type)
    got = run(tmp_path, patch_trl(entropy_source="sampler"), loss_type=loss_type)
    assert (difference(got, want) < FIVE_DIGITS).all(), f"{got}\n{want}"
    assert (want[:, 1] > 0).all()


VARIANTS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "entropy-bonus": {"entropy_coef": 0.1},
    "sequence-ratios": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "off-policy-mask": {"off_policy_mask_threshold": 0.5, "loss_type": "grpo"},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_around_the_mask_stays(tmp_path, name):
    want = run(tmp_path, nullcontext(), **VARIANTS[name])
    got = run(tmp_path, patch_trl(entropy_source="sampler"), **VARIANTS[name])
    assert (difference(got, want) < FIVE_DIGITS).all(), f"{got}\n{want}"


def test_the_head_sees_the_selected_tokens_alone(tmp_path, monkeypatch):
    kept, counts = Kept(monkeypatch), Counted(monkeypatch, D, V)
    run(tmp_path, patch_trl(entropy_source="sampler"))
    assert counts.forward == kept.counts(kept.keeps)
    assert counts.backward == [3 * count for count in kept.counts(kept.active)]
    for keep, mask in zip(kept.keeps, kept.masks, strict=True):
        assert 0.2 * int(mask.sum()) <= int(keep.sum()) < 0.2 * int(mask.sum()) + 4


@pytest.mark.parametrize("name", ["sequence-ratios", "off-policy-mask"])
def test_the_head_sees_all_tokens_where_the_loss_reads_them(tmp_path, monkeypatch, name):
    kept, counts = Kept(monkeypatch), Counted(monkeypatch, D, V)
    run(tmp_path, patch_trl(entropy_source="sampler"), **VARIANTS[name])
    assert counts.forward == kept.counts(kept.masks)


def test_old_log_probs_of_all_tokens_and_ratios_of_the_selected(tmp_path, monkeypatch):
    """A generation is used twice; what the loss of all tokens' log-probs is, stays."""
    settings = {"num_iterations": 2, "max_steps": 4, "loss_type": "dapo"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trl_rollout, "_reads_others", lambda trainer: True)
        want = run(tmp_path, patch_trl(entropy_source="sampler"), **settings)
    kept, counts = Kept(monkeypatch), Counted(monkeypatch, D, V)
    got = run(tmp_path, patch_trl(entropy_source="sampler"), **settings)
    assert (difference(got, want)[:2] < FIVE_DIGITS).all(), f"{got}\n{want}"
    first, _, second, _ = kept.counts(kept.masks)
    keeps = kept.counts(kept.keeps)
    assert counts.forward == [first, *keeps[:2], second, *keeps[2:]]


def test_the_threshold_of_a_step_scores_nothing_twice(tmp_path, monkeypatch):
    kept = Kept(monkeypatch, _trl_step, "high_entropy_mask_of_step")
    counts = Counted(monkeypatch, D, V)
    settings = {"gradient_accumulation_steps": 3, "max_steps": 2}
    run(tmp_path, patch_trl(entropy_source="sampler", scope="step"), **settings)
    assert len(kept.keeps) == 6
    for step in (slice(0, 3), slice(3, 6)):
        masks = kept.masks[step]
        entropies = [
            inputs["sampling_entropies"][mask]
            for inputs, mask in zip(kept.inputs[step], masks, strict=True)
        ]
        entropy = torch.cat(entropies)
        least = entropy.topk(math.ceil(0.2 * len(entropy))).values[-1]
        keeps = torch.cat([k[m] for k, m in zip(kept.keeps[step], masks, strict=True)])
        assert torch.equal(keeps, entropy >= least)
    assert counts.forward == kept.counts(kept.keeps)


def test_sampled_log_probs_are_the_old_ones(tmp_path, monkeypatch):
    """As recomputed ones, which the same policy has; and nothing is scored before the loss."""
    settings = {"num_iterations": 2, "max_steps": 4}
    want = run(tmp_path, patch_trl(entropy_source="sampler"), **settings)
    kept, counts = Kept(monkeypatch), Counted(monkeypatch, D, V)
    both = {"entropy_source": "sampler", "old_logprob": "sampler"}
    got = run(tmp_path, patch_trl(**both), **settings)
    assert (difference(got, want)[:2] < FIVE_DIGITS).all(), f"{got}\n{want}"
    assert counts.forward == kept.counts(kept.keeps)


def test_aligned_steps_have_the_samplers_log_probs_too(tmp_path, monkeypatch):
    """TRL would take the current policy's own; here the ratio says how far apart the two are."""
    kept = Kept(monkeypatch)
    with patch_trl(old_logprob="sampler"):
        build(tmp_path, SampleOneByOne(), top_entropy_quantile=0.2, max_steps=1).train()
    (inputs,) = kept.inputs
    assert torch.equal(inputs["old_per_token_logps"], inputs["sampling_per_token_logps"])


class Scores:
    """Log-probs and entropies that the losses of a run read, on their masks."""

    def __init__(self, monkeypatch):
        self.logps, self.entropies = [], []
        score = GRPOTrainer._get_per_token_logps_and_entropies

        def scored(trainer, *args, **options):
            found = score(trainer, *args, **options)
            self.logps.append(found[0].detach())
            self.entropies.append(found[1])
            return found

        monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", scored)


@pytest.mark.parametrize("as_lists", [True, False])
def test_log_probs_and_entropies_over_sets_are_the_samplers(tmp_path, monkeypatch, as_lists):
    sampler = SampleOneByOne(fields=ALL_FIELDS, top=TOP)

    def rollout(prompts, trainer):
        found = sampler(prompts, trainer)
        if not as_lists:
            found["sampling_sets"] = as_supports(found["sampling_sets"])
        return found

    kept = Kept(monkeypatch)
    with patch_trl(), pytest.MonkeyPatch.context() as around:
        scores = Scores(around)
        got = columns(build(tmp_path, rollout, top_entropy_quantile=0.2))
    assert (got[:, 1] > 0).all()
    assert len(kept.inputs) == 3
    for inputs, mask, logps, entropies in zip(
        kept.inputs, kept.masks, scores.logps, scores.entropies, strict=True
    ):
        for found, want in (
            (logps, inputs["sampling_per_token_logps"]),
            (entropies, inputs["sampling_entropies"]),
        ):
            torch.testing.assert_close(found[mask], want[mask], rtol=1e-5, atol=2e-6)
        assert float(entropies[mask].max()) <= math.log(TOP) + 1e-6


def test_sets_and_the_samplers_mask_and_log_probs_together(tmp_path, monkeypatch):
    """As with the current policy's entropies over the sets, and old log-probs recomputed."""
    rollout = SampleOneByOne(fields=ALL_FIELDS, top=TOP)
    settings = {"num_iterations": 1, "max_steps": 3}
    want = run(tmp_path, patch_trl(), rollout, **settings)
    counts = Counted(monkeypatch, D, V)
    both = {"entropy_source": "sampler", "old_logprob": "sampler"}
    got = run(tmp_path, patch_trl(**both), rollout, **settings)
    assert (difference(got, want)[:2] < FIVE_DIGITS).all(), f"{got}\n{want}"
    assert counts.forward == []


def test_a_tools_tokens_have_empty_sets(tmp_path, monkeypatch):
    """They are no part of the loss, and nobody asks whether they are in their set."""
    sampler = SampleOneByOne(fields=ALL_FIELDS, top=TOP)

    def rollout(prompts, trainer):
        found = sampler(prompts, trainer)
        found["env_mask"] = [[int(i != 1) for i in range(len(x))] for x in found["completion_ids"]]
        for sets in found["sampling_sets"]:
            sets[1:2] = [[]] * len(sets[1:2])
        return found

    both = {"entropy_source": "sampler", "old_logprob": "sampler"}
    got = run(tmp_path, patch_trl(**both), rollout)
    assert got.isfinite().all()
    assert (got[:, 1] > 0).all()


def test_a_log_prob_that_nobody_reads_may_be_anything(tmp_path, monkeypatch):
    """exp(0 - -200) is inf, and its product with a mask NaN."""
    sampler = SampleOneByOne()

    def rollout(prompts, trainer):
        found = sampler(prompts, trainer)
        entropies = found["sampling_entropies"]
        least = statistics.median(x for row in entropies for x in row)
        found["logprobs"] = [
            [x if h > least else -200.0 for x, h in zip(*rows, strict=True)]
            for rows in zip(found["logprobs"], entropies, strict=True)
        ]
        return found

    kept = Kept(monkeypatch)
    both = {"entropy_source": "sampler", "old_logprob": "sampler"}
    settings = {"max_steps": 1, "logging_nan_inf_filter": False}
    got = run(tmp_path, patch_trl(**both), rollout, **settings)
    assert (kept.inputs[0]["old_per_token_logps"] == -200).any()
    assert not (kept.keeps[0] & (kept.inputs[0]["old_per_token_logps"] == -200)).any()
    assert got.isfinite().all()


def _rank(rank, folder, port):
    """TRL's own run and one by the sampler's entropies, on two processes."""
    os.environ |= place(rank, 2, port)
    torch.set_num_threads(1)
    options = {"ddp_backend": "gloo", "max_steps": 2}
    want = run(f"{folder}/{rank}", nullcontext(), **options)
    got = run(f"{folder}/{rank}", patch_trl(entropy_source="sampler"), **options)
    torch.save(difference(got, want), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The threshold is of both, as TRL's."""
    store = meeting()
    spawn(_rank, args=(str(tmp_path), store.port), nprocs=2)
    for rank in range(2):
        assert (torch.load(tmp_path / f"{rank}.pt") < FIVE_DIGITS).all()


def test_an_evaluation_takes_what_its_own_rollouts_know(tmp_path):
    with patch_trl(entropy_source="sampler", scope="step"):
        trainer = build(tmp_path, SampleOneByOne(), top_entropy_quantile=0.2, max_steps=1)
        trainer.train()
        trainer.eval_dataset = trainer.train_dataset.select(range(2))
        assert math.isfinite(trainer.evaluate()["eval_loss"])
