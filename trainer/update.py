"""Old-policy statistics of a step's responses, and one optimizer step on them, over all ranks.

B sequences, L response width; T response tokens of a micro-batch, D hidden.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from trainer import config
from trainer.batch import Rollouts
from trainer.finite import Guard, check_finite, first_nonfinite, nonfinite_statistic
from trainer.fsdp import release, whole
from trainer.metrics import Meter, Stopwatch, correction
from trainer.packing import lengths, pack
from trainer.partition import partition
from trainer.policy import Policy
from trainer.ranks import Ranks

# Entropies this close, relatively, tie. Those of one token differ by the rounding of sums in
# another order, and the token at the threshold must not fall out by it.
TIE = 1e-5
OF_THE_STEP = (
    *("entropy/threshold", "entropy/mean"),
    *("mismatch/k3", "mismatch/max_ratio", "mismatch/outside"),
)


@dataclass
class Batch:
    """Rollouts with all that the loss needs."""

    rollouts: Rollouts
    advantage_B: Tensor
    old_logprob_BL: Tensor
    selected_BL: Tensor  # by the old policy's entropies
    threshold: Tensor  # of the old policy's entropies over the whole step

    def rows(self, index: Tensor) -> "Batch":
        """The batch of some of its sequences."""
        return Batch(
            self.rollouts.rows(index),
            self.advantage_B[index],
            self.old_logprob_BL[index],
            self.selected_BL[index],
            self.threshold,
        )


def micro_batches(rollouts: Rollouts, tokens: int, ranks: Ranks) -> Iterator[Tensor]:
    """Row numbers of this rank's sequences in each micro-batch of at most `tokens` tokens."""
    for parts in partition(lengths(rollouts), ranks.size, tokens):
        yield torch.tensor(parts[ranks.rank], dtype=torch.long, device=rollouts.mask_BL.device)


@torch.no_grad()
def score(
    policy: Policy, rollouts: Rollouts, settings: config.Config, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Log-probs [B, L] and entropies [B, L] under the current weights, in one pass; the threshold
    of all of them; and the seconds spent in the head. The first three are those of all ranks."""
    policy.train(False)
    threshold = ek.StreamingThreshold(
        settings.algorithm.fraction, group=ranks.group, device=policy.device
    )
    score_2BL = torch.zeros((2, *rollouts.mask_BL.shape), device=policy.device)
    watch = Stopwatch(policy.device)
    for index in micro_batches(rollouts, settings.optimizer.tokens_per_micro_batch, ranks):
        part = rollouts.rows(index)
        target_T = part.response_BL[part.mask_BL]

        def head(
            hidden_TD: Tensor, head: dict[str, Any], target_T: Tensor = target_T
        ) -> ek.LogprobEntropy:
            watch.start()
            found = ek.linear_logprob_entropy(hidden_TD, target=target_T, **head)
            watch.stop()
            return found

        found = policy(pack(part, policy.layout), settings.rollout.temperature, head)
        b_T, l_T = part.mask_BL.nonzero(as_tuple=True)
        score_2BL[:, index[b_T], l_T] = torch.stack([found.logprob, found.entropy])
        threshold.update(found.entropy)
    release(policy)
    logprob_BL, entropy_BL = ranks.sum(score_2BL)
    return logprob_BL, entropy_BL, threshold.value(), watch.seconds


def at_least(entropy: Tensor, threshold: Tensor) -> Tensor:
    """I[H >= tau], ties included; true for NaN, which shows in the loss instead of disappearing."""
    return ~(entropy < threshold * (1 - TIE))


def check_statistics(
    policy: Policy, batch: Batch, entropy_BL: Tensor, ranks: Ranks, guard: Guard
) -> dict[str, float]:
    """{"skipped/nonfinite_NAME": 1} for the first statistic of a step that is not finite, if any.

    Raises:
        NotFinite: so is a weight; or `guard` has counted too many skips.
    """
    name = nonfinite_statistic(
        {
            "logprob": batch.old_logprob_BL,
            "entropy": entropy_BL,
            "sampler_logprob": batch.rollouts.sampler_logprob_BL,
            "reward": batch.rollouts.reward_B,
            "advantage": batch.advantage_B,
        },
        batch.rollouts.mask_BL,
    )
    if name is None:
        return {}
    check_finite(policy.model.named_parameters(), ranks, "though updates left it so")
    guard.count(f"{name} is not finite")
    return {f"skipped/nonfinite_{name}": 1.0}


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: config.Config,
    ranks: Ranks,
    guard: Guard | None = None,
) -> tuple[dict[str, float], float]:
    """One optimizer step on `batch`, the same on every rank. Returns its metrics and the seconds
    that this rank spent in the head.

    Micro-batches and ranks add up sums; the gradient is divided once, by the count of the whole
    batch, so that their number changes nothing. There is no step, and "skipped/REASON" is 1, for a
    batch without a selected token or an advantage, and where loss or gradient are not finite.

    Raises:
        NotFinite: a weight is not finite after the step, or `guard` has counted too many skips.
    """
    guard = guard or Guard(limit=settings.optimizer.max_nonfinite)
    if reason := _nothing_to_learn(batch, settings.algorithm):
        return _no_update(batch, reason), 0.0
    policy.train()
    meter, watch = Meter(), Stopwatch(policy.device)
    for index in micro_batches(batch.rollouts, settings.optimizer.tokens_per_micro_batch, ranks):
        metrics = _backward(policy, batch.rows(index), settings, watch)
        meter.add(metrics, weight=float(metrics["tokens/selected"]))
    found = Meter.of(ranks.gather(meter)).result()
    kept, everything = int(found.pop("tokens/selected")), int(found.pop("tokens/all"))
    count = _count(batch, kept, everything, settings.algorithm)
    named = [(name, p) for name, p in policy.model.named_parameters() if p.grad is not None]
    for _, parameter in named:
        parameter.grad.div_(count / ranks.size)  # FSDP2 has divided by the number of ranks
    norm = whole(torch.nn.utils.get_total_norm([p.grad for _, p in named]))
    loss = found.pop("sum/loss") / count
    problem = None
    if not (norm.isfinite() and math.isfinite(loss)):
        names = ranks.gather(first_nonfinite((name, p.grad) for name, p in named))
        name = next(filter(None, names), None)
        problem = f"the gradient of {name} is not finite" if name else "the loss is not finite"
    elif kept:
        limit = settings.optimizer.grad_clip
        torch.nn.utils.clip_grads_with_norm_([p for _, p in named], limit, norm)
        optimizer.step()
        check_finite(policy.model.named_parameters(), ranks, "after this update")
    optimizer.zero_grad()
    guard.count(problem)
    return found | {
        "loss": loss,
        "grad_norm": float(norm),
        "entropy/selected_fraction": kept / max(everything, 1),
        "head/rows": everything,
        "skipped/nonfinite_gradient": float(not norm.isfinite()),
        "skipped/nonfinite_loss": float(not math.isfinite(loss)),
        "skipped/no_tokens": float(not kept),
    }, watch.seconds


def _nothing_to_learn(batch: Batch, settings: config.Algorithm) -> str | None:
    """Why `batch` has no gradient, as the name of a metric; AdamW would move by its moments."""
    if not batch.advantage_B.any():
        return "skipped/no_advantage"
    # The current entropies select tokens later.
    old = settings.entropy_source == "old" or settings.fraction == 1
    return "skipped/no_tokens" if old and not batch.selected_BL.any() else None


def _no_update(batch: Batch, reason: str) -> dict[str, float]:
    """Metrics of an update that is not made for `reason`; those that its forward would have given
    are missing."""
    everything, kept = batch.rollouts.mask_BL.sum(), batch.selected_BL.sum()
    return {
        "loss": 0.0,
        "grad_norm": 0.0,
        "entropy/selected_fraction": float(kept / everything.clamp_min(1)),
        "head/rows": float(everything),
        "skipped/nonfinite_gradient": 0.0,
        reason: 1.0,
    }


def _backward(
    policy: Policy, part: Batch, settings: config.Config, watch: Stopwatch
) -> dict[str, Any]:
    """Add the gradient of the sum of the loss of a micro-batch. Returns its metrics; `watch` times
    the head: its forward, and its backward, which is over when hidden states have a gradient."""

    def head(hidden_TD: Tensor, head: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        if hidden_TD.requires_grad:
            hidden_TD.register_hook(lambda _: watch.stop())
        # Later micro-batches add to the first one's gradient where it is; FSDP2 has it elsewhere.
        main_grad = head["weight"].grad if head["weight"].is_leaf else None
        watch.start()
        found = _loss(hidden_TD, part, head | {"main_grad": main_grad}, settings)
        watch.stop()
        return found

    packed = pack(part.rollouts, policy.layout)
    loss, metrics = policy(packed, settings.rollout.temperature, head)
    watch.start()
    loss.backward()
    for name in OF_THE_STEP:
        metrics.pop(name, None)  # of this micro-batch; the step has its own
    return metrics | {"sum/loss": loss.detach()}


def _loss(
    hidden_TD: Tensor, part: Batch, head: dict[str, Any], settings: config.Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the batch's loss: equation 6 of the paper without its normalisation."""
    algorithm, corrected = settings.algorithm, correction(settings)
    mask_BL = part.rollouts.mask_BL
    sequence_T, _ = mask_BL.nonzero(as_tuple=True)
    target_T, selected_T = part.rollouts.response_BL[mask_BL], part.selected_BL[mask_BL]
    mask_T = torch.ones_like(selected_T)

    def options(selected_T: Tensor) -> dict[str, Any]:
        counted_T = selected_T if algorithm.denominator == "selected" else mask_T
        return {
            "old_logprob": part.old_logprob_BL[mask_BL],
            "advantage": part.advantage_B[sequence_T],
            "mask": mask_T,
            "selected": selected_T,
            "clip_low": algorithm.clip_low,
            "clip_high": algorithm.clip_high,
            "dual_clip": algorithm.dual_clip,
            "denominator": 1.0,
            "token_weight": _share(counted_T, sequence_T)
            if algorithm.loss_type == "grpo"
            else None,
            "sampler_logprob": part.rollouts.sampler_logprob_BL[mask_BL] if corrected else None,
            **corrected,
        }

    # A threshold would drop tokens whose entropy has fallen below all of the old ones.
    if algorithm.entropy_source == "old" or algorithm.fraction == 1:
        return ek.high_entropy_policy_loss(
            hidden_TD, target=target_T, **options(selected_T), **head
        )
    found = ek.linear_logprob_entropy(
        hidden_TD, target=target_T, keep_logits_above=part.threshold * (1 - TIE), **head
    )
    entropy_T = found.entropy.detach()
    selected_T = at_least(entropy_T, part.threshold)
    loss, metrics = ek.ratio_loss(found.logprob, **options(selected_T))
    kept = entropy_T[selected_T].sum() / selected_T.sum().clamp_min(1)
    return loss, metrics | {"entropy/selected_mean": kept}


def _share(counted_T: Tensor, sequence_T: Tensor) -> Tensor:
    """1 / the number of counted tokens of each token's sequence: GRPO's mean over a sequence."""
    count_B = torch.zeros(len(counted_T), device=counted_T.device)
    count_B.index_add_(0, sequence_T, counted_T.float())
    return (1 / count_B.clamp_min(1))[sequence_T]


def _count(batch: Batch, kept: int, everything: int, settings: config.Algorithm) -> int:
    """What the sums over micro-batches are divided by."""
    if settings.loss_type == "grpo":
        return max(len(batch.rollouts), 1)
    return max(kept if settings.denominator == "selected" else everything, 1)
