"""The policy loss on per-token log-probabilities: [T]-sized PyTorch, differentiated by autograd.

B sequences, L their length.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOSS_TYPES = ("dapo", "grpo")
# |log ratio| is clamped here before exp, as verl does; beyond, the ratio is meaningless.
LOG_RATIO_BOUND = 20.0


def ratio_loss(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"] | None,
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    selected: Bool[Tensor, "*tokens"] | None = None,
    loss_type: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    denominator: str | float | Tensor = "selected",
    num_sequences: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The clipped policy loss of PPO, GRPO and DAPO over the selected tokens.

    r_t = exp(logprob_t - old_logprob_t)
    loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    and, with dual clip c, for A_t < 0: min(loss_t, -c A_t).

    loss_type "dapo" (DAPO, arXiv 2503.14476; arXiv 2506.01939v2, equation 6): the sum over the
    selected tokens, over one count of tokens: the `denominator`.
    loss_type "grpo" (DeepSeekMath, arXiv 2402.03300): each sequence's sum over its own count, then
    the mean over the sequences with a token of the loss mask, or over `num_sequences`.

    A token whose ratio is clipped, whose advantage is zero, or that is not selected gets a gradient
    of exactly zero, whatever its logprob (inf and NaN included). A NaN among the selected tokens
    makes the loss NaN. No selected token: the loss is 0, its gradients too.

    Args:
        logprob: fp32, with gradient. [B, L] for "grpo".
        old_logprob: of the sampling policy, without gradient; None: on-policy, ratio 1.
        advantage: one a token, or [B] where logprob is [B, L].
        mask: the loss mask: false for prompt, padding and tool tokens.
        selected: the tokens to train on, a subset is formed with `mask`; None: all of the mask.
        dual_clip: c > 1 (10 in the paper's scripts), or None.
        denominator: "selected" (paper v2 and its code), "all" tokens of the mask (paper v1, TRL),
            or for "dapo" a count: that of the whole step, so that the sum over micro-batches and
            ranks equals one batch.
        num_sequences: for "grpo", the number of sequences of the whole step, to the same end.

    Returns:
        The loss, and metrics as 0-dim tensors without gradient: clip/low, clip/high (share of the
        selected tokens whose gradient was clipped away; clip/low includes the dual clip),
        ratio/mean, ratio/max, kl/k1, kl/k3 (estimates of KL(old || new) over the selected tokens),
        entropy/kept_fraction (selected over mask), head/active_rows (tokens with a gradient),
        tokens/all, tokens/kept.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown loss_type or denominator, a clip
            range or dual_clip out of bounds.
    """
    selected = mask if selected is None else selected
    _check_tensors(logprob, old_logprob, mask, selected)
    _check_aggregation(logprob, loss_type, denominator, num_sequences)
    _check_clip(clip_low, clip_high, dual_clip)
    kept = mask & selected
    advantage = torch.where(kept, _per_token(advantage, logprob), 0.0)
    old = logprob.detach() if old_logprob is None else old_logprob.detach()
    log_ratio = torch.where(kept, logprob - old, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)

    with torch.no_grad():
        above = dual_clip if dual_clip is not None else torch.inf
        low = (advantage < 0) & ((ratio < 1 - clip_low) | (ratio > above))
        high = (advantage > 0) & (ratio > 1 + clip_high)
        metrics = _metrics(log_ratio, kept, mask, low, high, (advantage != 0) & ~low & ~high)
    counted = mask if isinstance(denominator, str) and denominator == "all" else kept
    if loss_type == "dapo":
        count = counted.sum() if isinstance(denominator, str) else denominator
        return loss.sum() / _at_least_one(count), metrics
    sequences = mask.any(1).sum() if num_sequences is None else num_sequences
    means = loss.sum(1) / counted.sum(1).clamp_min(1)
    return means.sum() / _at_least_one(sequences), metrics


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp_min(1) if isinstance(count, Tensor) else count


def _per_token(advantage: Tensor, logprob: Tensor) -> Tensor:
    if advantage.shape == logprob.shape:
        return advantage.detach()
    if logprob.ndim == 2 and advantage.shape == logprob.shape[:1]:
        return advantage.detach().unsqueeze(1).expand_as(logprob)
    raise ValueError(
        f"advantage must have logprob's shape {tuple(logprob.shape)}, or be [B] where logprob is "
        f"[B, L]; got {tuple(advantage.shape)}"
    )


def _metrics(
    log_ratio: Tensor, kept: Tensor, mask: Tensor, low: Tensor, high: Tensor, active: Tensor
) -> dict[str, Tensor]:
    count = kept.sum()
    mean = 1.0 / count.clamp_min(1)
    ratio = torch.where(kept, log_ratio.exp(), 0.0)
    return {
        "clip/low": low.sum() * mean,
        "clip/high": high.sum() * mean,
        "ratio/mean": ratio.sum() * mean,
        "ratio/max": torch.cat([ratio.flatten(), ratio.new_zeros(1)]).max(),
        "kl/k1": -log_ratio.sum() * mean,
        "kl/k3": torch.where(kept, log_ratio.expm1() - log_ratio, 0.0).sum() * mean,
        "entropy/kept_fraction": count / mask.sum().clamp_min(1),
        "head/active_rows": active.sum(),
        "tokens/all": mask.sum(),
        "tokens/kept": count,
    }


def _check_tensors(
    logprob: Tensor, old_logprob: Tensor | None, mask: Tensor, selected: Tensor
) -> None:
    like = {"old_logprob": old_logprob, "mask": mask, "selected": selected}
    for name, x in like.items():
        if x is not None and x.shape != logprob.shape:
            raise ValueError(
                f"{name} must have logprob's shape {tuple(logprob.shape)}; got {tuple(x.shape)}"
            )
    for name, x in {"mask": mask, "selected": selected}.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor; got {x.dtype}")


def _check_aggregation(
    logprob: Tensor,
    loss_type: str,
    denominator: str | float | Tensor,
    num_sequences: float | Tensor | None,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}")
    if isinstance(denominator, str) and denominator not in ("selected", "all"):
        raise ValueError(f'denominator must be "selected", "all" or a count; got {denominator!r}')
    for name, count in {"denominator": denominator, "num_sequences": num_sequences}.items():
        if isinstance(count, int | float) and not count > 0:
            raise ValueError(f"{name} must be > 0; got {count}")
    if loss_type == "grpo" and not isinstance(denominator, str):
        raise ValueError(
            'with loss_type="grpo" denominator must be "selected" or "all", each sequence has its '
            f"own count (num_sequences takes the step's); got {denominator!r}"
        )
    if loss_type == "grpo" and logprob.ndim != 2:
        raise ValueError(f'loss_type="grpo" needs [B, L] inputs; got {tuple(logprob.shape)}')
    if loss_type == "dapo" and num_sequences is not None:
        raise ValueError('num_sequences has a meaning with loss_type="grpo" only')


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            "clip_low must lie in [0, 1] and clip_high be >= 0; "
            f"got clip_low={clip_low}, clip_high={clip_high}"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None; got {dual_clip}")
