"""Advantages and clip ranges made of entropies."""

import torch
from torch import Tensor

from .._arguments import check_finite, check_number, check_tensor, shown
from .._shapes import Bool, Float
from ._tokens import check_tokens, per_token


def entropy_advantage(
    advantage: Float[Tensor, "..."],
    entropy: Float[Tensor, "*tokens"],
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
) -> Float[Tensor, "*tokens"]:
    """A + min(alpha H, |A| / kappa): more for uncertain tokens, the sign unchanged for kappa > 1.

    Reasoning with Exploration (arXiv 2506.14758); alpha 0.4 for GRPO and 0.1 for PPO.
    """
    check_tokens({"entropy": entropy})
    check_finite("alpha", alpha)
    check_number("kappa", kappa, "a number > 0", lambda x: x > 0)
    advantage = per_token(advantage, entropy, "entropy")
    return advantage + torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)


def two_clip_ranges(
    high_entropy: Bool[Tensor, "*tokens"],
    *,
    low: tuple[float, float] = (0.2, 0.2),
    high: tuple[float, float] = (0.5, 0.5),
) -> tuple[Float[Tensor, "*tokens"], Float[Tensor, "*tokens"]]:
    """clip_low and clip_high of each token: `high` where the entropy is high, else `low`.

    Archer (arXiv 2507.15778), with high_entropy = top_entropy_mask(..., scope="sequence"); it also
    gives the other tokens a KL: `kl_coef=torch.where(high_entropy, 0.0, 1e-3)`.
    """
    check_tensor("high_entropy", high_entropy, "bool")
    for name, pair in {"low": low, "high": high}.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{name} must be two clips, (clip_low, clip_high); got {shown(pair)}")
        for clip in pair:
            check_number(name, clip, "two clips >= 0", lambda x: x >= 0)
    pairs = zip(high, low, strict=True)
    clip_low, clip_high = (torch.where(high_entropy, yes, no) for yes, no in pairs)
    return clip_low, clip_high
