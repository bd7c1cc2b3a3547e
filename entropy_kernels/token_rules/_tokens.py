"""What the rules share: checks, means and counts over a mask."""

import torch
from torch import Tensor

from .._arguments import check_advantage, check_tensor


def check_tokens(tokens: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> None:
    """Floating-point tensors and bool masks, all of the shape of the first."""
    of, like = next(iter(tokens.items()))
    check_tensor(of, like, "floating-point")
    for name, x in tokens.items():
        check_tensor(name, x, "floating-point", like, of)
    for name, x in (masks or {}).items():
        check_tensor(name, x, "bool", like, of)


def per_token(advantage: Tensor, like: Tensor, of: str) -> Tensor:
    check_advantage(advantage, like, of)
    a_token = advantage.shape == like.shape
    return advantage if a_token else advantage.unsqueeze(1).expand_as(like)


def mean_over(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x.detach(), 0.0).sum() / mask.sum().clamp_min(1)


def count_of(mask: Tensor, fraction: float) -> Tensor:
    return (mask.sum().double() * fraction).floor().clamp_min(1)


def largest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` tokens of `among` with the largest score, the first of equals."""
    order = score.masked_fill(~among, -torch.inf).flatten().argsort(descending=True, stable=True)
    place = torch.arange(order.numel(), device=order.device)
    rank = torch.empty_like(order).scatter(0, order, place)
    return among & (rank.view(score.shape) < count)
