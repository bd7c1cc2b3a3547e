"""Old-policy statistics of a step's responses, and one optimizer step on them.

B sequences, L response width, D hidden.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from trainer import config
from trainer.mismatch import correction
from trainer.policy import Policy
from trainer.types import Rollouts

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


@dataclass
class Meter:
    """Metrics of parts joined into those of the whole: counts (head/*, skipped/*) add up, maxima
    stay maxima, all others are means, weighted."""

    totals: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, Any], weight: float) -> None:
        """The metrics of one part."""
        for name, value in metrics.items():
            before = self.totals.get(name, 0.0)
            if name.endswith("/max"):
                self.totals[name] = max(before, float(value))
            elif name.startswith(("head/", "skipped/")):
                self.totals[name] = before + float(value)
            else:
                self.totals[name] = before + weight * float(value)
                self.weights[name] = self.weights.get(name, 0.0) + weight

    def result(self) -> dict[str, float]:
        """The metrics of the whole."""
        return {
            name: total / max(self.weights[name], 1e-9) if name in self.weights else total
            for name, total in self.totals.items()
        }


def micro_batches(rollouts: Rollouts, tokens: int) -> Iterator[Tensor]:
    """Row numbers in pieces of at most `tokens` padded tokens (at least one row each)."""
    width = rollouts.prompt_BP.shape[1] + rollouts.response_BL.shape[1]
    yield from torch.arange(len(rollouts)).split(max(tokens // width, 1))


@torch.no_grad()
def score(
    policy: Policy, rollouts: Rollouts, settings: config.Config
) -> tuple[Tensor, Tensor, ek.StreamingThreshold, float]:
    """Log-probs [B, L] and entropies [B, L] under the current weights, in one pass; the threshold
    of all of them; and the seconds spent in the head."""
    policy.model.eval()
    head = policy.head(settings.rollout.temperature)
    threshold = ek.StreamingThreshold(settings.algorithm.fraction)
    logprob_BL = torch.zeros(rollouts.mask_BL.shape, device=policy.device)
    entropy_BL, seconds = torch.zeros_like(logprob_BL), 0.0
    for index in micro_batches(rollouts, settings.optimizer.tokens_per_micro_batch):
        part = rollouts.rows(index)
        hidden = policy.response_hidden(part)
        began = clock(policy.device)
        target = part.response_BL.masked_fill(~part.mask_BL, -100)
        found = ek.linear_logprob_entropy(hidden, target=target, **head)
        seconds += clock(policy.device) - began
        logprob_BL[index], entropy_BL[index] = found.logprob, found.entropy
        threshold.update(found.entropy, part.mask_BL)
    return logprob_BL, entropy_BL, threshold, seconds


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, settings: config.Config
) -> tuple[dict[str, float], float]:
    """One optimizer step on `batch`. Returns its metrics and the seconds spent in the head.

    Micro-batches add up sums; the gradient is divided once, by the count of the whole batch, so
    that their number changes nothing. The head's backward ends at the hidden states, then theirs
    runs through the backbone.
    """
    policy.model.train()
    head = policy.head(settings.rollout.temperature)
    meter, kept, everything, loss_sum, seconds = Meter(), 0, 0, 0.0, 0.0
    for index in micro_batches(batch.rollouts, settings.optimizer.tokens_per_micro_batch):
        part = batch.rows(index)
        hidden = policy.response_hidden(part.rollouts)
        began = clock(policy.device)
        leaf = hidden.detach().requires_grad_()
        loss, metrics = _loss(leaf, part, head, settings)
        loss.backward()
        for name in OF_THE_STEP:
            metrics.pop(name, None)  # of this micro-batch; the step has its own
        seconds += clock(policy.device) - began
        hidden.backward(leaf.grad)
        here = int(metrics.pop("tokens/kept"))
        kept, everything = kept + here, everything + int(metrics.pop("tokens/all"))
        meter.add(metrics, weight=here)
        loss_sum += float(loss.detach())

    count = _count(batch, kept, everything, settings.algorithm)
    parameters = [p for p in policy.model.parameters() if p.grad is not None]
    for parameter in parameters:
        parameter.grad.div_(count)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.optimizer.grad_clip)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    result = meter.result() | {
        "loss": loss_sum / count,
        "grad_norm": float(norm),
        "entropy/kept_fraction": kept / max(everything, 1),
        "head/rows": everything,
        "skipped/nonfinite_gradient": float(not norm.isfinite()),
    }
    return result, seconds


def _loss(
    hidden: Tensor, part: Batch, head: dict[str, Any], settings: config.Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the batch's loss: equation 6 of the paper without its normalisation."""
    rollouts, algorithm, corrected = part.rollouts, settings.algorithm, correction(settings)
    grpo = algorithm.loss_type == "grpo"
    # A threshold would drop tokens whose entropy has fallen below all of the old ones.
    known = algorithm.entropy_source == "old" or algorithm.fraction == 1
    return ek.high_entropy_policy_loss(
        hidden,
        target=rollouts.response_BL.masked_fill(~rollouts.mask_BL, 0),
        old_logprob=part.old_logprob_BL,
        advantage=part.advantage_B,
        mask=rollouts.mask_BL,
        selected=part.selected_BL if known else None,
        threshold=None if known else part.threshold,
        loss_type=algorithm.loss_type,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        denominator=algorithm.denominator if grpo else 1.0,
        num_sequences=1.0 if grpo else None,
        sampler_logprob=rollouts.sampler_logprob_BL if corrected else None,
        **corrected,
        **head,
    )


def _count(batch: Batch, kept: int, everything: int, settings: config.Algorithm) -> int:
    """What the sums over micro-batches are divided by."""
    if settings.loss_type == "grpo":
        return max(len(batch.rollouts), 1)
    return max(kept if settings.denominator == "selected" else everything, 1)


def clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
