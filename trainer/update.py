"""Old-policy statistics of a step's responses, and one optimizer step on them, over all ranks.

B sequences, T response tokens, D hidden.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.backends import beside_head
from trainer import config
from trainer.batch import Batch, Rollouts, micro_batches, pack
from trainer.entropy_bonus import loss_on_all, make_bonus, metrics_of_bonus, sums_of_bonus
from trainer.finite import Guard, check_finite, first_nonfinite, nonfinite_statistic
from trainer.fsdp import release, whole
from trainer.metrics import Meter, Stopwatch, correction, numbers
from trainer.model.embedding import one_gradient
from trainer.policy import Policy
from trainer.ranks import Ranks

# Entropies within this relative distance tie. Two computations of one entropy add in another order
# and differ by rounding, which must not drop the token at the threshold.
TIE = 1e-5
# Metrics of a micro-batch that the step has as a whole.
OF_THE_STEP = ("entropy/threshold", "entropy/mean")


class Scores(NamedTuple):
    """What the current policy says of the response tokens of all ranks."""

    logprob_T: Tensor
    """Log-probs of the tokens, nats."""
    entropy_T: Tensor
    """Entropies at the temperature of sampling, nats."""
    threshold: Tensor
    """The entropy that `algorithm.fraction` of the tokens reach."""
    head_seconds: float
    """Seconds that this rank spent in the head."""


@torch.no_grad()
def score(
    policy: Policy,
    rollouts: Rollouts,
    settings: config.Config,
    ranks: Ranks,
    selected_T: Tensor | None = None,
) -> Scores:
    """Log-probs and entropies under the current weights, in one pass, and their threshold.

    With `selected_T` the head runs on these tokens alone. The others have 0, and do not count.
    """
    policy.train(False)
    threshold = ek.StreamingThreshold(
        settings.algorithm.fraction,
        group=ranks.group,
        device=policy.device,
        impl=beside_head(settings.model.impl),
    )
    score_2T = torch.zeros((2, len(rollouts.sampler_logprob_T)), device=policy.device)
    watch = Stopwatch(policy.device)

    for index in micro_batches(rollouts, settings.optimizer.tokens_per_micro_batch, ranks):
        part = rollouts.rows(index)
        at = rollouts.places(index, len(part.sampler_logprob_T))
        rows = None if selected_T is None else selected_T[at].nonzero().squeeze(1)

        def statistics(
            head: ek.Head, kept: ek.Support | None = part.kept, rows: Tensor | None = rows
        ) -> ek.LogprobEntropy:
            watch.start()
            if rows is not None:
                head, kept = head.at(rows), kept and kept.at(rows)
            found = ek.linear_logprob_entropy(head, support=kept, impl=settings.model.impl)
            watch.stop()
            return found

        packed = pack(part, policy.layout)
        found = policy(packed, settings.rollout.temperature, statistics)
        at = at if rows is None else at[rows]
        score_2T[:, at] = torch.stack([found.logprob, found.entropy])
        threshold.update(found.entropy)
    release(policy)
    logprob_T, entropy_T = ranks.sum(score_2T)
    return Scores(logprob_T, entropy_T, threshold.value(), watch.seconds)


def at_least(entropy: Tensor, threshold: Tensor) -> Tensor:
    """I[H >= tau], ties included. NaN is selected too: it shows in the loss, and is not lost."""
    return ~(entropy < threshold * (1 - TIE))


def check_statistics(
    policy: Policy, batch: Batch, entropy_T: Tensor, ranks: Ranks, guard: Guard
) -> dict[str, float]:
    """{"skipped/nonfinite_NAME": 1} for the first statistic of a step that is not finite, if any.

    `entropy_T` selects the tokens.

    Raises:
        NotFinite: a weight is not finite either, or `guard` has counted too many skips.
    """
    name = nonfinite_statistic(
        {
            "sampler_logprob": batch.rollouts.sampler_logprob_T,
            "logprob": batch.old_logprob_T,
            "entropy": entropy_T,
            "reward": batch.rollouts.reward_B,
            "advantage": batch.advantage_B,
        }
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
    entropy_coef: float = 0.0,
) -> tuple[dict[str, float], float]:
    """One optimizer step on `batch`, which is the same on every rank.

    Micro-batches and ranks add up sums, and the gradient is divided once, by the count of the whole
    batch: how many there are changes nothing. A batch without a selected token or an advantage
    makes no step, nor does a loss or gradient that is not finite; "skipped/REASON" is then 1.
    `entropy_coef` is the coefficient of the entropy bonus, where the settings have one.
    Returns the metrics, and the seconds that this rank spent in the head.

    Raises:
        NotFinite: a weight is not finite after the step, or `guard` has counted too many skips.
    """
    guard = guard or Guard(limit=settings.optimizer.max_nonfinite)
    if reason := _nothing_to_learn(batch, settings.algorithm, entropy_coef):
        return _no_update(batch, reason), 0.0
    everything, over_all = len(batch.selected_T), _divides_by_all(batch, settings.algorithm)
    bonus = make_bonus(batch, settings.algorithm, entropy_coef)
    batch = _cut(batch, over_all and settings.algorithm.loss_type == "grpo")
    policy.train()
    meter, watch = Meter(), Stopwatch(policy.device)
    parts = micro_batches(batch.rollouts, settings.optimizer.tokens_per_micro_batch, ranks)
    with one_gradient(policy.model):
        found_in = [_backward(policy, batch.rows(index), settings, watch, bonus) for index in parts]
    for metrics in numbers(found_in):
        meter.add(metrics, weight=metrics["tokens/selected"])
    found = Meter.of(ranks.gather(meter)).result()
    selected = int(found.pop("tokens/selected"))
    found.pop("tokens/all")  # those that are left of cut responses
    tokens = everything if over_all else selected
    count = max(len(batch.rollouts) if settings.algorithm.loss_type == "grpo" else tokens, 1)
    named = [(name, p) for name, p in policy.model.named_parameters() if p.grad is not None]
    scale = ranks.size / count  # FSDP2 has divided by the number of ranks
    norm = scale * whole(torch.nn.utils.get_total_norm([p.grad for _, p in named]))
    loss = found.pop("sum/loss") / count
    if "sum/entropy" in found:
        over = selected if settings.algorithm.entropy_over == "selected" else everything
        found |= metrics_of_bonus(found.pop("sum/entropy"), over, entropy_coef)
    problem = None
    if not (norm.isfinite() and math.isfinite(loss)):
        names = ranks.gather(first_nonfinite((name, p.grad) for name, p in named))
        name = next(filter(None, names), None)
        problem = f"the gradient of {name} is not finite" if name else "the loss is not finite"
    elif selected:
        limit = settings.optimizer.grad_clip
        scale *= min(limit / (float(norm) + 1e-6), 1.0)  # clips: one pass over the gradients
        for _, parameter in named:
            parameter.grad.mul_(scale)
        optimizer.step()
        check_finite(policy.model.named_parameters(), ranks, "after this update")
    optimizer.zero_grad()
    guard.count(problem)
    return found | {
        "loss": loss,
        "grad_norm": float(norm),
        "entropy/selected_fraction": selected / max(everything, 1),
        "head/rows": everything,
        "skipped/nonfinite_gradient": float(not norm.isfinite()),
        "skipped/nonfinite_loss": float(not math.isfinite(loss)),
        "skipped/no_tokens": float(not selected),
    }, watch.seconds


def _divides_by_all(batch: Batch, settings: config.Algorithm) -> bool:
    """Whether the loss is divided by the number of all tokens, also of those that are cut off."""
    return batch.weight_T is not None or settings.denominator == "all"


def _cut(batch: Batch, means_of_whole: bool) -> Batch:
    """`batch` with its responses cut. `means_of_whole`: their means are those of whole ones."""
    cut = batch.cut()
    if cut is batch or not means_of_whole:
        return cut
    kept_B = cut.rollouts.response_length_B
    share_B = kept_B.float() / batch.rollouts.response_length_B
    share_T = share_B.repeat_interleave(kept_B, output_size=len(cut.selected_T))
    return replace(cut, weight_T=share_T if cut.weight_T is None else cut.weight_T * share_T)


def _nothing_to_learn(batch: Batch, settings: config.Algorithm, entropy_coef: float) -> str | None:
    """Why `batch` has no gradient, as the name of a metric, if it has none.

    AdamW would still move the weights, by its moments.
    """
    bonus = settings.has_bonus and entropy_coef != 0
    if not (bonus or batch.advantage_B.any()):
        return "skipped/no_advantage"
    # The current entropies select their tokens during the update.
    none = settings.mask_known and not batch.selected_T.any()
    return "skipped/no_tokens" if none else None


def _no_update(batch: Batch, reason: str) -> dict[str, float]:
    """Metrics of an update that is not made for `reason`, without those of a forward."""
    everything, selected = len(batch.selected_T), int(batch.selected_T.sum())
    return {
        "loss": 0.0,
        "grad_norm": 0.0,
        "entropy/selected_fraction": selected / max(everything, 1),
        "head/rows": float(everything),
        "skipped/nonfinite_gradient": 0.0,
        reason: 1.0,
    }


def _backward(
    policy: Policy, part: Batch, settings: config.Config, watch: Stopwatch, bonus: ek.EntropyBonus
) -> dict[str, Any]:
    """Add the gradient of the sum of a micro-batch's losses, and return its metrics.

    `watch` times the head: its forward, and its backward, which ends when hidden states have a
    gradient.
    """

    def loss_of(head: ek.Head) -> tuple[Tensor, dict[str, Tensor]]:
        if head.hidden.requires_grad:
            head.hidden.register_hook(lambda _: watch.stop())
        watch.start()
        found = _loss(head, part, settings, bonus)
        watch.stop()
        return found

    packed = pack(part.rollouts, policy.layout)
    loss, metrics = policy(packed, settings.rollout.temperature, loss_of)
    watch.start()
    loss.backward()
    for name in OF_THE_STEP:
        metrics.pop(name, None)  # of this micro-batch; the step has its own
    return sums_of_bonus(metrics, settings.algorithm) | {"sum/loss": loss.detach()}


def _loss(
    head: ek.Head, part: Batch, settings: config.Config, bonus: ek.EntropyBonus
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of the tokens ("dapo") or of the sequences' means ("grpo").

    It is equation 6 of the paper without its normalisation.
    """
    algorithm, rollouts = settings.algorithm, part.rollouts
    # With all tokens a threshold would drop those whose entropy fell below the lowest old one.
    if algorithm.mask_known:
        tokens: dict[str, Any] = {"selected": part.selected_T}
    else:
        tie = ek.Selection(threshold_tolerance=TIE)
        tokens = {"threshold": part.threshold, "selection": tie}
    by_sequence = algorithm.loss_type == "grpo"
    over_all = _divides_by_all(part, algorithm)
    options: dict[str, Any] = {
        "lengths": rollouts.response_length_B,
        "loss_type": algorithm.loss_type,
        "clip_low": algorithm.clip_low,
        "clip_high": algorithm.clip_high,
        "dual_clip": algorithm.dual_clip,
        "denominator": ("all" if over_all else "selected") if by_sequence else 1.0,
        "aggregation": ek.Aggregation(
            num_sequences=1.0 if by_sequence else None, token_weight=part.weight_T
        ),
        "correction": correction(settings, rollouts.sampler_logprob_T),
        "entropy_bonus": bonus,
    }
    # Later micro-batches add to the first one's gradient where it is; FSDP2 has it elsewhere.
    main_grad, impl = head.weight.grad if head.weight.is_leaf else None, settings.model.impl
    if algorithm.mask_known and bonus.on == "all":
        return loss_on_all(head, part, impl, main_grad, options)
    return ek.high_entropy_policy_loss(
        head,
        part.old_logprob_T,
        part.advantage_B,
        torch.ones_like(part.selected_T),
        support=rollouts.kept,
        backend=ek.Backend(impl, main_grad=main_grad),
        **tokens,
        **options,
    )
