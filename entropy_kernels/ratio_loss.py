"""The policy loss on per-token log-probabilities: counts and weights, then a loss and its terms.

T tokens, B sequences, L their length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._arguments import as_scalar
from ._loss_options import LossOptions
from ._loss_tokens import Tokens, check_contents, read_tokens
from ._ratio_kernel import clipped_by_kernel, of_ratios, plain
from ._shapes import Bool, Float, Int
from .backends import resolve
from .loss_terms import aggregation_weight, correction_weight, kl_divergence, mismatch, poison
from .losses import Loss, bounded
from .options import KL, Aggregation, Correction, EntropyBonus, Parallel


def ratio_loss(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"] | None,
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    selected: Bool[Tensor, "*tokens"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    loss_type: str | Callable[..., Tensor] = "dapo",
    clip_low: float | Float[Tensor, "..."] | None = None,
    clip_high: float | Float[Tensor, "..."] | None = None,
    dual_clip: float | None = None,
    denominator: str | float | Tensor = "selected",
    aggregation: Aggregation = Aggregation(),
    kl: KL = KL(),
    correction: Correction = Correction(),
    entropy: Float[Tensor, "*tokens"] | None = None,
    entropy_bonus: EntropyBonus = EntropyBonus(),
    parallel: Parallel = Parallel(),
    impl: str = "auto",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The policy loss over the selected tokens; by default DAPO's clipped ratio.

    L = sum_b weight_b sum_t (w_t loss_t + KL.coef KL_t - EntropyBonus.coef H_t)

    t runs over the tokens of `mask` that are `selected`. loss_t is one of `entropy_kernels.losses`.
    For "dapo", "grpo", "bnpo" and "dr_grpo", with r_t = exp(logprob_t - old_logprob_t), it is

    loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), for A_t < 0 at most
    -dual_clip A_t (arXiv 2506.01939v2, equation 6; DAPO 2503.14476; DeepSeekMath 2402.03300).

    With clips that are numbers, these four run in one kernel, which finds the gradient in the same
    pass. The other losses, the KL and the entropy bonus are plain PyTorch. docs/losses.md lists
    every loss, its source and where the conventions of other libraries differ.

    Gradient: the loss is differentiable once, with respect to logprob and entropy. A token that is
    not selected gets a gradient of exactly zero. In losses of single tokens so does one whose
    advantage or weight is zero, one whose ratio is clipped, and one whose |log ratio| passes 20. A
    ratio on a bound counts as inside. Losses over sequences treat a clipped sequence likewise.

    Values: log ratios are clamped to 20. Tokens that are not selected may hold anything, unless a
    sum over their sequence includes them. A NaN at a selected token, in any input and whatever its
    advantage, makes the loss NaN and the gradient of that token NaN. In losses over sequences it
    makes the gradient of its sequence NaN. Without a selected token, loss and gradients are 0.

    Args:
        logprob: log-probabilities of the policy, with gradient; computed in fp32, or in fp64 where
            it is fp64. Losses and aggregations over sequences need [B, L], or [T] with lengths.
        old_logprob: those of the sampling policy, without gradient; None: on-policy, ratio 1.
        advantage: one per token (PPO with a value function), or one per sequence, [B].
        mask: the loss mask, false for prompt, padding and tool tokens, and where no target is.
        selected: the tokens to train on, as far as `mask` has them; None: all of the mask.
        lengths: int64 [B], the tokens of each sequence; logprob and all that has its shape are
            then [T], the sequences one after the other. They are padded to fp32 [B, L] where the
            loss needs sequences, which waits for a GPU once, unless lengths is on the CPU. Inside
            of torch.compile, which cannot wait, L is T.
        loss_type: "dapo", "grpo", "bnpo", "dr_grpo", "gspo", "gspo_token", "luspo", "gmpo",
            "cispo", "sapo", "vespo", "dppo_tv", "dppo_kl", "gpg" or "reinforce"; or a function
            (logprob, old_logprob, advantage, mask) -> the loss of each token, as those are. With
            sequence_group a function of your own takes that as a keyword too.
        clip_low, clip_high: distances from a ratio of 1. None: the loss's own (0.2 and 0.28); a
            tensor: a range per token.
        dual_clip: c > 1 (10 in the paper's scripts), or None. A two-sided delta is the same.
        denominator: for "token-mean" the count that the sum over tokens is divided by. "selected"
            counts these tokens (paper v2 and its code), "all" those of the mask (paper v1, TRL). A
            number is the count of the whole step, so that micro-batches add up to one batch. Where
            DDP or FSDP2 averages gradients, it is the mean count per rank
            (`StreamingThreshold.denominator`, `distributed.mean_count`). For "seq-mean-token-mean"
            the word says which tokens of a sequence count; for "seq-mean-token-sum-norm" the number
            is the constant length.
        aggregation: how sequences count, and weights of tokens: `Aggregation`.
        kl: a penalty on the distance to a reference policy: `KL`.
        correction: weights for the mismatch between sampler and trainer: `Correction`.
        entropy: the entropy of each token, with gradient, from `linear_logprob_entropy`.
        entropy_bonus: the coefficient of `entropy`: `EntropyBonus`.
        parallel: the ranks that share the batch or its sequences: `Parallel`.
        impl: the clipped ratio's kernel. "cpu", compiled, takes fp32 on a CPU; "triton" and
            "cuda" fp32 on a GPU; "torch" any device. "auto" takes the kernel that fits, and a GPU's
            only on a kind of GPU where it was found to be right.

    Returns:
        The loss and its metrics, 0-dim tensors without gradient. Means are over selected tokens.

        - ratio/mean, ratio/max; kl/k1 and kl/k3, estimates of KL(old || new);
        - tokens/all, tokens/selected, and entropy/selected_fraction, their quotient;
        - from the kernel clip/low and clip/high, the share of tokens whose gradient was clipped
          away (clip/low includes the dual clip). From it also head/active_rows, the number of
          tokens with a gradient, unless the loss has a KL or a bonus;
        - with a reference kl/reference;
        - with an entropy bonus entropy/of_bonus, the mean entropy of its tokens, nats;
          entropy/coefficient, its coefficient, and entropy/bonus, their product;
        - with a sampler mismatch/k3, mismatch/max_ratio and mismatch/difference, the mean of
          |log r_t| with r_t as in `Correction`. With a type of correction also mismatch/outside,
          the share of tokens whose ratio was truncated or masked.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown word, a bound out of its
            range, an option without meaning for the loss or aggregation. On a CPU and outside of
            torch.compile also impossible values at selected tokens. These are log-probs above 0, an
            infinite old, sampler's or reference's log-prob, an infinite advantage, a weight below
            0.

    A clip_high between 1 and 2 for ratios warns once: it is a distance, not the bound.
    """
    options = LossOptions(
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        denominator=denominator,
        aggregation=aggregation,
        kl=kl,
        correction=correction,
        entropy_bonus=entropy_bonus,
        parallel=parallel,
    )
    if parallel.vocab_group is not None:
        raise ValueError("vocab_group divides the head; log-probs that are given know no group")
    given = logprob, old_logprob, advantage, mask, selected, entropy
    return loss_of_tokens(read_tokens(*given, lengths, options), options, impl)


def loss_of_tokens(
    tokens: Tokens, options: LossOptions, impl: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ratio_loss` of tokens that are checked, in rows where the loss needs sequences."""
    options.check_call(tokens.entropy is not None, tokens.old_logprob is not None)
    by_kernel = options.has_kernel
    dtype = torch.float64 if tokens.logprob.dtype == torch.float64 else torch.float32
    impl = resolve("ratio_loss", impl, tokens.logprob.device, dtype) if by_kernel else plain(impl)
    kl, bonus = options.kl, options.entropy_bonus
    mask, selected = tokens.mask, tokens.mask & tokens.selected
    over = mask if options.sequence_over == "all" else selected
    check_contents(tokens, mask if "all" in (options.sequence_over, kl.on, bonus.on) else selected)
    new = tokens.logprob.to(dtype)
    old = (new if tokens.old_logprob is None else tokens.old_logprob.to(dtype)).detach()
    tokens = tokens._replace(
        logprob=new, old_logprob=old, advantage=tokens.advantage.to(dtype), selected=selected
    )
    factor, metrics = _factor(tokens, old, options)
    counted = (
        mask if isinstance(options.denominator, str) and options.denominator == "all" else selected
    )
    scales = {"selected": _scale(options, mask, counted, dtype)}
    if "all" in (kl.on, bonus.on):
        scales["all"] = _scale(options, mask, mask, dtype)
    if by_kernel:
        scale_B, dual_clip = scales["selected"], options.dual_clip
        total, found = clipped_by_kernel(tokens, factor, scale_B, dual_clip, impl)
    else:
        loss = options.function(tokens.clip_low, tokens.clip_high)
        total, found = _by_function(loss, tokens, old, factor, over, scales["selected"])
    metrics |= found | _counts(selected, mask)
    on = {"selected": selected, "all": mask}
    if tokens.reference_logprob is not None:
        term, metrics["kl/reference"] = _kl(tokens, old, kl.type, on[kl.on], scales[kl.on])
        total = total + term
    if tokens.entropy is not None and options.has_bonus:
        coef = as_scalar(bonus.coef, dtype, mask.device)
        term, found = _bonus(tokens.entropy.to(dtype), coef, on[bonus.on], scales[bonus.on])
        total, metrics = total - term, metrics | found
    if tokens.reference_logprob is not None or options.has_bonus:
        metrics.pop("head/active_rows", None)
    return total, metrics


def _scale(options: LossOptions, mask: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """What the sum over each sequence, or over all tokens, is multiplied with."""
    return aggregation_weight(
        options.aggregation_type,
        mask,
        counted,
        options.denominator,
        options.aggregation.num_sequences,
        dtype,
        group=options.parallel.sequence_group,
        mean_group=options.parallel.group,
    )


def _factor(
    tokens: Tokens, old: Tensor, options: LossOptions
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What multiplies the tokens' losses, and how far apart sampler and trainer are."""
    weight, sampler, selected = tokens.token_weight, tokens.sampler_logprob, tokens.selected
    factor = None if weight is None else weight.detach().to(old.dtype)
    if sampler is None:
        return factor, {}
    sampler, kind = sampler.to(old.dtype), options.correction.type
    current = options.correction.of == "current"
    policy = tokens.logprob.detach() if current else old
    log_ratio = mismatch(policy, sampler, tokens.mask)
    among = selected.sum().clamp_min(1)
    excess = torch.where(selected, log_ratio.expm1() - log_ratio, 0.0)
    largest = _largest(log_ratio.exp(), selected)
    distance = torch.where(selected, log_ratio, 0.0).abs().sum() / among
    metrics = {
        "mismatch/k3": excess.sum() / among,
        "mismatch/max_ratio": largest,
        "mismatch/difference": distance,
    }
    if kind is None:
        return factor, metrics
    ratio = mismatch(policy, sampler, tokens.mask, kind, options.parallel.sequence_group).exp()
    bounds = {"cap": options.correction.cap, "floor": options.correction.floor}
    corrected = correction_weight(ratio, kind, **bounds)
    metrics["mismatch/outside"] = (selected & (corrected != ratio)).sum() / among
    # The ratio of the current policy is in the loss already.
    weight = corrected / ratio if current else corrected
    return weight if factor is None else factor * weight, metrics


def _by_function(
    loss: Loss,
    tokens: Tokens,
    old: Tensor,
    factor: Tensor | None,
    over: Tensor,
    scale_B: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A token that is not selected is a constant to the loss; one that it does not read is 0."""
    new, advantage, selected = tokens.logprob, tokens.advantage, tokens.selected
    seen = torch.where(selected, new, new.detach())
    seen, old, advantage = (torch.where(over, x, 0.0) for x in (seen, old, advantage))
    token_loss = loss(seen, old, advantage, over)
    if token_loss.shape != new.shape:
        raise ValueError(
            f"loss_type must return the loss of each token, {tuple(new.shape)}; "
            f"got {tuple(token_loss.shape)}"
        )
    if factor is not None:
        active = selected & (factor != 0)
        token_loss = torch.where(active, token_loss * torch.where(active, factor, 0.0), 0.0)
    broken = selected & (token_loss.isnan() | new.isnan() | old.isnan() | advantage.isnan())
    token_loss = torch.where(selected, token_loss, 0.0) + poison(seen, broken)

    log_ratio = bounded(torch.where(selected, new.detach() - old, 0.0))
    ratio = torch.where(selected, log_ratio.exp(), 0.0)
    excess = (log_ratio.expm1() - log_ratio).sum()
    sums = torch.stack([ratio.sum(), _largest(ratio, selected), log_ratio.sum(), excess])
    return _sum(token_loss, scale_B), of_ratios(sums, selected.sum().clamp_min(1))


def _kl(
    tokens: Tokens, old: Tensor, kind: str, on: Tensor, scale_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The penalty, and the mean of the KL over its tokens; the other tokens may hold anything."""
    assert tokens.reference_logprob is not None
    new, reference = tokens.logprob, tokens.reference_logprob.detach().to(tokens.logprob.dtype)
    new, old, reference = (torch.where(on, x, 0.0) for x in (new, old, reference))
    kl = kl_divergence(new, reference, kind, old)
    mean = torch.where(on, kl.detach(), 0.0).sum() / on.sum().clamp_min(1)
    coef = tokens.kl_coef
    coef = coef.detach().to(new.dtype) if isinstance(coef, Tensor) else coef
    term = torch.where(on & (coef != 0), coef * kl, 0.0)
    return _sum(term + poison(new, term.isnan()), scale_B), mean


def _bonus(
    entropy: Tensor, coef: Tensor, on: Tensor, scale_B: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The bonus and its metrics; the other tokens may hold anything."""
    entropy = torch.where(on, entropy, 0.0)
    mean = entropy.detach().sum() / on.sum().clamp_min(1)
    entropy = entropy + poison(entropy, entropy.isnan())
    metrics = {"entropy/of_bonus": mean, "entropy/bonus": coef * mean, "entropy/coefficient": coef}
    return coef * _sum(entropy, scale_B), metrics


def _sum(x: Tensor, scale_B: Tensor) -> Tensor:
    """The sum over tokens, each sequence times its scale, or all times the one scale."""
    if scale_B.numel() == 1:
        return x.sum() * scale_B[0]
    return (x.sum(1) * scale_B).sum()


def _largest(x: Tensor, among: Tensor) -> Tensor:
    return torch.where(among, x, 0.0).amax() if x.numel() else x.new_zeros(())


def _counts(selected: Tensor, mask: Tensor) -> dict[str, Tensor]:
    count, valid = selected.sum(), mask.sum()
    return {
        "entropy/selected_fraction": count / valid.clamp_min(1),
        "tokens/all": valid,
        "tokens/selected": count,
    }
