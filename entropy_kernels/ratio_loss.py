"""The policy loss on per-token log-probabilities: counts and weights, then a loss and its terms.

B sequences, L their length.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._loss_options import (
    check_arguments,
    check_contents,
    check_counts,
    find_loss,
    sees_sequences,
)
from ._ratio_kernel import clipped_by_kernel, has_kernel, of_ratios, plain
from ._shapes import Bool, Float
from .backends import resolve
from .loss_terms import aggregation_weight, correction_weight, kl_divergence, mismatch, poison
from .losses import Loss, bounded


def ratio_loss(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"] | None,
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    selected: Bool[Tensor, "*tokens"] | None = None,
    loss_type: str | Callable[..., Tensor] = "dapo",
    clip_low: float | Float[Tensor, "..."] | None = None,
    clip_high: float | Float[Tensor, "..."] | None = None,
    dual_clip: float | None = None,
    sequence_over: str | None = None,
    aggregation: str | None = None,
    denominator: str | float | Tensor = "selected",
    num_sequences: float | Tensor | None = None,
    group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    token_weight: Float[Tensor, "*tokens"] | Bool[Tensor, "*tokens"] | None = None,
    sampler_logprob: Float[Tensor, "*tokens"] | None = None,
    correction: str | None = None,
    correction_cap: float | None = 2.0,
    correction_floor: float | None = None,
    reference_logprob: Float[Tensor, "*tokens"] | None = None,
    kl_coef: float | Float[Tensor, "..."] = 0.0,
    kl_type: str = "k3",
    kl_on: str = "selected",
    entropy: Float[Tensor, "*tokens"] | None = None,
    entropy_coef: float = 0.0,
    entropy_on: str = "selected",
    impl: str = "auto",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The policy loss over the selected tokens; by default DAPO's clipped ratio.

    sum_b weight_b sum_t w_t loss_t + kl_coef KL_t - entropy_coef H_t, t over the kept tokens:
    those of `mask` that are `selected`. loss_t is one of `entropy_kernels.losses`: for "dapo",
    "grpo", "bnpo" and "dr_grpo", with r_t = exp(logprob_t - old_logprob_t),

    loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), for A_t < 0 at most
    -dual_clip A_t (arXiv 2506.01939v2, equation 6; DAPO 2503.14476; DeepSeekMath 2402.03300).

    With clips that are numbers these have one kernel that finds the gradient in the same pass; the
    others, the KL and the entropy bonus are plain PyTorch. docs/losses.md has all of them, their
    sources and where conventions differ.

    Differentiable once, with respect to logprob and entropy. loss_t gives a gradient of exactly
    zero to a token that is not kept; in losses of single tokens also to one whose advantage or
    weight is zero, whose ratio is clipped, or whose |log ratio| passes 20, where it is clamped (by
    the kernel whatever the logprob, also inf); in losses over sequences to all of a sequence that
    is clipped. On a bound itself a ratio counts as inside. What is not kept may be anything, unless
    a sequence's sum runs over it. A NaN at a kept token, in any input and whatever its advantage
    and weight, makes the loss NaN, and so the gradient of that token; in losses over sequences that
    of its sequence. No kept token: the loss is 0, its gradients too.

    Args:
        logprob: with gradient; computed in fp32, or in fp64 where it is fp64. [B, L] for losses and
            aggregations over sequences.
        old_logprob: of the sampling policy, without gradient; None: on-policy, ratio 1.
        advantage: one a token (PPO with a value function), or [B] where logprob is [B, L].
        mask: the loss mask: false for prompt, padding and tool tokens, and where no target is.
        selected: the tokens to train on, a subset is formed with `mask`; None: all of the mask.
        loss_type: "dapo", "grpo", "bnpo", "dr_grpo", "gspo", "gspo_token", "luspo", "gmpo",
            "cispo", "sapo", "vespo", "dppo_tv", "dppo_kl", "gpg" or "reinforce"; or a function
            (logprob, old_logprob, advantage, mask) -> the loss of each token, as those are.
        clip_low, clip_high: None for the loss's own (0.2 and 0.28); a tensor for a range a token.
        dual_clip: c > 1 (10 in the paper's scripts), or None. A two-sided delta is the same.
        sequence_over: the tokens that a loss over sequences sums log-ratios over: "all" of the mask
            (default of gspo, gspo_token, luspo, vespo), or the "selected" (gmpo, and what a
            function of your own gets as its mask). Only kept tokens get a gradient either way.
        aggregation: None for the loss's own, or "token-mean", "seq-mean-token-mean",
            "seq-mean-token-sum", "seq-mean-token-sum-norm" (verl's names).
        denominator: "selected" (paper v2 and its code), "all" tokens of the mask (paper v1, TRL),
            or for "token-mean" what this call's sum is divided by: the count of the whole step, so
            that the sum over micro-batches equals one batch. Where DDP or FSDP2 averages gradients
            over ranks it is the mean count per rank: `StreamingThreshold.denominator`,
            `distributed.mean_count`. For "seq-mean-token-sum-norm" the constant length.
        num_sequences: for the aggregations over sequences, their number in the whole step, or its
            mean per rank, likewise; None: those with a token of the loss mask.
        group: the ranks over which DDP or FSDP2 averages gradients, those of sequence_group among
            them. What is left to be counted here becomes the mean count per rank: the averages are
            the loss and the gradient of one process. Every rank calls, also one without a token.
        sequence_group: a process group whose ranks share the sequences: each holds a part, maybe
            none, of the tokens of the same B sequences in the same order. Counts that are left to
            this function, and what is summed over a sequence, are those of whole sequences; the
            loss is this rank's part of a sum over the ranks, metrics are of its own tokens. Every
            rank calls this and, for losses over sequences, runs backward. A function of your own
            gets it as a keyword.
        token_weight: w_t >= 0 from outside, such as a soft mask; the denominator is as without.
        sampler_logprob: of the engine that sampled, where its log-probs differ from old_logprob's.
            w_t is multiplied with a correction of pi_old / pi_sampler.
        correction: "tis" (truncated to the cap), "mis" (IcePop: 0 outside of floor and cap), and
            "sequence_truncate", "sequence_mask", the same with the product over all of the
            sequence's mask. None: metrics alone.
        correction_cap, correction_floor: the bounds, or None.
        reference_logprob: of the reference policy. KL_t is an estimate of KL(pi || reference).
        kl_coef: one, or one a token.
        kl_type: "k1", "k2", "k3", "abs"; "k1+", "k3+", with the gradient of k2; "k3_corrected".
        kl_on: "selected" tokens, or "all" of the mask: every row then gets a gradient, and the
            head's backward is dense. Words as denominator then count all of the mask for the KL.
        entropy: of each token, with gradient: `linear_logprob_entropy(...).entropy`.
        entropy_coef: of the entropy bonus, aggregated as the loss is.
        entropy_on: as kl_on.
        impl: of the clipped ratio's kernel: "auto", what fits of the following; "cpu", the compiled
            kernel, for fp32 on a CPU; "triton", fp32 on a GPU (by itself only where it was found
            to be right on that kind of GPU); or "torch", any device.

    Returns:
        The loss, and metrics as 0-dim tensors without gradient: ratio/mean, ratio/max, kl/k1,
        kl/k3 (estimates of KL(old || new) over the selected tokens), entropy/selected_fraction
        (selected over mask), tokens/all, tokens/selected; from the kernel also clip/low, clip/high
        (share of the selected tokens whose gradient was clipped away; clip/low includes the dual
        clip) and, without KL and bonus, head/active_rows (tokens whose gradient is not zero); with
        reference_logprob kl/reference; with sampler_logprob mismatch/k3, mismatch/max_ratio and,
        with a correction, mismatch/outside (share of selected tokens whose ratio was truncated or
        masked).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown word, a bound out of its
            range, an option without meaning for the loss or aggregation that was asked for. On a
            CPU and outside of torch.compile also values, at kept tokens, that cannot be: log-probs
            above 0 (probabilities, or negative log-likelihoods), an old, sampler's or reference's
            of -inf, an infinite advantage, a weight below 0.

    A clip_high between 1 and 2 for ratios warns once: it is a distance, not the bound.
    """
    selected = mask if selected is None else selected
    options = {
        "loss_type": loss_type,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "sequence_over": sequence_over,
        "aggregation": aggregation,
        "denominator": denominator,
        "num_sequences": num_sequences,
        "sequence_group": sequence_group,
        "token_weight": token_weight,
        "sampler_logprob": sampler_logprob,
        "correction": correction,
        "correction_cap": correction_cap,
        "correction_floor": correction_floor,
        "reference_logprob": reference_logprob,
        "kl_coef": kl_coef,
        "kl_type": kl_type,
        "kl_on": kl_on,
        "entropy": entropy,
        "entropy_coef": entropy_coef,
        "entropy_on": entropy_on,
    }
    masks = {"mask": mask, "selected": selected}
    check_arguments(logprob, old_logprob, advantage, masks, options)
    loss, own_aggregation, own_over = find_loss(loss_type)
    aggregation, over = aggregation or own_aggregation, sequence_over or own_over
    clip: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    bounds = correction_cap, correction_floor
    counts: dict[str, Any] = {"denominator": denominator, "num_sequences": num_sequences}
    check_counts(group, aggregation=aggregation, **counts)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    by_kernel = has_kernel(loss_type, clip_low, clip_high)
    impl = resolve("ratio_loss", impl, logprob.device, dtype) if by_kernel else plain(impl)

    kept = mask & selected
    seen = mask if "all" in (over, kl_on, entropy_on) else kept
    check_contents(seen, logprob, old_logprob, advantage, options)
    new, advantage = logprob.to(dtype), _per_token(advantage, logprob).to(dtype)
    old = (new if old_logprob is None else old_logprob.to(dtype)).detach()
    weights = token_weight, sampler_logprob
    factor, metrics = _factor(old, mask, kept, *weights, correction, *bounds, sequence_group)
    scale = functools.partial(
        aggregation_weight,
        aggregation,
        mask,
        **counts,
        dtype=dtype,
        group=sequence_group,
        mean_group=group,
    )
    counted = mask if isinstance(denominator, str) and denominator == "all" else kept
    tokens = {"selected": (kept, scale(counted=counted))}
    if "all" in (kl_on, entropy_on):
        tokens["all"] = mask, scale(counted=mask)

    if by_kernel:
        total, found = clipped_by_kernel(
            new, old, advantage, factor, *tokens["selected"], clip, impl
        )
    else:
        given = {name: value for name, value in clip.items() if value is not None}
        if sequence_group is not None and sees_sequences(loss_type):
            given["sequence_group"] = sequence_group
        loss = functools.partial(loss, **given) if given else loss
        seen = mask if over == "all" else kept
        total, found = _by_function(loss, new, old, advantage, factor, seen, *tokens["selected"])
    metrics |= found | _counts(kept, mask)
    if reference_logprob is not None:
        how = kl_coef, kl_type, *tokens[kl_on]
        term, metrics["kl/reference"] = _kl(new, old, reference_logprob.to(dtype), *how)
        total = total + term
    if entropy is not None and entropy_coef != 0:
        on, scale_B = tokens[entropy_on]
        bonus = torch.where(on, entropy.to(dtype), 0.0)
        total = total - entropy_coef * _sum(bonus + poison(bonus, bonus.isnan()), scale_B)
    if reference_logprob is not None or entropy_coef != 0:
        metrics.pop("head/active_rows", None)
    return total, metrics


# What callers that select tokens and have the head's entropy themselves forward to ratio_loss.
LOSS_OPTIONS = frozenset(
    p.name for p in inspect.signature(ratio_loss).parameters.values() if p.kind is p.KEYWORD_ONLY
) - {"selected", "entropy", "group", "impl"}


def _factor(
    old: Tensor,
    mask: Tensor,
    kept: Tensor,
    token_weight: Tensor | None,
    sampler_logprob: Tensor | None,
    correction: str | None,
    cap: float | None,
    floor: float | None,
    group: ProcessGroup | None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What the tokens' losses are multiplied with, and how far sampler and trainer are apart."""
    factor = None if token_weight is None else token_weight.detach().to(old.dtype)
    if sampler_logprob is None:
        return factor, {}
    sampler = sampler_logprob.to(old.dtype)
    log_ratio = mismatch(old, sampler, mask)
    among = kept.sum().clamp_min(1)
    excess = torch.where(kept, log_ratio.expm1() - log_ratio, 0.0)
    largest = _largest(log_ratio.exp(), kept)
    metrics = {"mismatch/k3": excess.sum() / among, "mismatch/max_ratio": largest}
    if correction is None:
        return factor, metrics
    ratio = mismatch(old, sampler, mask, correction, group).exp()
    weight = correction_weight(ratio, correction, cap=cap, floor=floor)
    metrics["mismatch/outside"] = (kept & (weight != ratio)).sum() / among
    return weight if factor is None else factor * weight, metrics


def _by_function(
    loss: Loss,
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    factor: Tensor | None,
    over: Tensor,
    kept: Tensor,
    scale_B: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is not kept is a constant to the loss, and what it does not look at is zero."""
    seen = torch.where(kept, new, new.detach())
    seen, old, advantage = (torch.where(over, x, 0.0) for x in (seen, old, advantage))
    token_loss = loss(seen, old, advantage, over)
    if token_loss.shape != new.shape:
        raise ValueError(
            f"loss_type must return the loss of each token, {tuple(new.shape)}; "
            f"got {tuple(token_loss.shape)}"
        )
    if factor is not None:
        active = kept & (factor != 0)
        token_loss = torch.where(active, token_loss * torch.where(active, factor, 0.0), 0.0)
    broken = kept & (token_loss.isnan() | new.isnan() | old.isnan() | advantage.isnan())
    token_loss = torch.where(kept, token_loss, 0.0) + poison(seen, broken)

    log_ratio = bounded(torch.where(kept, new.detach() - old, 0.0))
    ratio = torch.where(kept, log_ratio.exp(), 0.0)
    excess = (log_ratio.expm1() - log_ratio).sum()
    sums = torch.stack([ratio.sum(), _largest(ratio, kept), log_ratio.sum(), excess])
    return _sum(token_loss, scale_B), of_ratios(sums, kept.sum().clamp_min(1))


def _kl(
    new: Tensor,
    old: Tensor,
    reference: Tensor,
    coef: float | Tensor,
    kind: str,
    on: Tensor,
    scale_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """The term, and the mean over its tokens; others may be anything."""
    new, old, reference = (torch.where(on, x, 0.0) for x in (new, old, reference.detach()))
    kl = kl_divergence(new, reference, kind, old)
    mean = torch.where(on, kl.detach(), 0.0).sum() / on.sum().clamp_min(1)
    coef = torch.as_tensor(coef, dtype=new.dtype, device=new.device).detach()
    term = torch.where(on & (coef != 0), coef * kl, 0.0)
    return _sum(term + poison(new, term.isnan()), scale_B), mean


def _sum(x: Tensor, scale_B: Tensor) -> Tensor:
    """Of the tokens, each sequence's times its scale, or all of them times the one scale."""
    if scale_B.numel() == 1:
        return x.sum() * scale_B[0]
    return (x.sum(1) * scale_B).sum()


def _largest(x: Tensor, among: Tensor) -> Tensor:
    return torch.where(among, x, 0.0).amax() if x.numel() else x.new_zeros(())


def _per_token(advantage: Tensor, logprob: Tensor) -> Tensor:
    a_token = advantage.shape == logprob.shape
    return advantage.detach() if a_token else advantage.detach().unsqueeze(1).expand_as(logprob)


def _counts(kept: Tensor, mask: Tensor) -> dict[str, Tensor]:
    count, valid = kept.sum(), mask.sum()
    return {
        "entropy/selected_fraction": count / valid.clamp_min(1),
        "tokens/all": valid,
        "tokens/selected": count,
    }
