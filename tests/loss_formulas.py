"""Each policy loss as its paper writes it: one token at a time, one scalar at a time.

x[b][t] is log pi, 0-dim tensors whose gradient is autograd's. A clip is an `if`, and its result a
number without gradient.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Batch:
    """Values of a batch, as scalars; `of` gives the tokens of a sequence that a sum runs over."""

    def __init__(self, x: Tensor, old: Tensor, advantage: Tensor, over: Tensor) -> None:
        self.x, self.old, self.advantage, self.over = x, old, advantage, over

    def log_ratio(self, b: int, t: int) -> Tensor:
        return clip(self.x[b, t] - self.old[b, t], -20, 20)

    def mean_log_ratio(self, b: int) -> Tensor:
        tokens = self.of(b)
        return sum(self.x[b, t] - self.old[b, t] for t in tokens) / len(tokens)

    def of(self, b: int) -> list[int]:
        return [t for t in range(self.x.shape[1]) if self.over[b, t]]


def clip(value: Tensor, low: float, high: float) -> Tensor:
    if value < low:
        return torch.tensor(low, dtype=value.dtype)
    return torch.tensor(high, dtype=value.dtype) if value > high else value


def least(a: Tensor, b: Tensor) -> Tensor:
    return a if a <= b else b


def number(x: Tensor) -> float:
    return float(x.detach())


def surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -least(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def clipped_ratio(q: Batch, b: int, t: int, dual_clip: float | None = None) -> Tensor:
    a = q.advantage[b, t]
    loss = surrogate(q.log_ratio(b, t).exp(), a, 0.2, 0.28)
    return least(loss, -dual_clip * a) if dual_clip is not None and a < 0 else loss


def gspo(q: Batch, b: int, t: int, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    return surrogate(q.mean_log_ratio(b).exp(), q.advantage[b, t], low, high)


def luspo(q: Batch, b: int, t: int) -> Tensor:
    return gspo(q, b, t, 2e-3, 2.5e-3)


def gspo_token(q: Batch, b: int, t: int) -> Tensor:
    x = q.x[b, t]
    ratio = q.mean_log_ratio(b).exp().detach() * x.exp() / x.exp().detach()
    return surrogate(ratio, q.advantage[b, t], 3e-4, 4e-4)


def gmpo(q: Batch, b: int, t: int) -> Tensor:
    terms = []
    for u in q.of(b):
        log_ratio, sign = q.log_ratio(b, u), 1 if q.advantage[b, u] > 0 else -1
        terms.append(sign * least(sign * log_ratio, sign * clip(log_ratio, -0.4, 0.4)))
    return -(sum(terms) / len(terms)).exp() * q.advantage[b, t]


def cispo(q: Batch, b: int, t: int) -> Tensor:
    weight = clip(q.log_ratio(b, t).exp(), 0, 5).detach()
    return -weight * q.advantage[b, t] * q.x[b, t]


def sapo(q: Batch, b: int, t: int) -> Tensor:
    tau = 1.0 if q.advantage[b, t] > 0 else 1.05
    gate = 1 / (1 + (-tau * (q.log_ratio(b, t).exp() - 1)).exp())
    return -4 / tau * gate * q.advantage[b, t]


def vespo(q: Batch, b: int, t: int) -> Tensor:
    k, rate = (2, 3) if q.advantage[b, t] >= 0 else (3, 2)
    w = math.exp(min(max(number(sum(q.log_ratio(b, u) for u in q.of(b))), math.log(1e-8)), 20))
    return -(w**k * math.exp(rate * (1 - w))) * q.advantage[b, t] * q.x[b, t]


def dppo_tv(q: Batch, b: int, t: int) -> Tensor:
    moved = number(q.x[b, t].exp() - q.old[b, t].exp())
    outside = moved > 0.15 if q.advantage[b, t] > 0 else moved < -0.15
    weight = 0.0 if outside else min(number(q.log_ratio(b, t).exp()), 20)
    return -weight * q.advantage[b, t] * q.x[b, t]


def dppo_kl(q: Batch, b: int, t: int) -> Tensor:
    new, old = number(q.x[b, t].exp()), number(q.old[b, t].exp())
    kl = old * math.log(old / new) + (1 - old) * math.log((1 - old + 1e-8) / (1 - new + 1e-8))
    outside = kl > 0.05 and (new > old if q.advantage[b, t] > 0 else new < old)
    weight = 0.0 if outside else min(number(q.log_ratio(b, t).exp()), 20)
    return -weight * q.advantage[b, t] * q.x[b, t]


def reinforce(q: Batch, b: int, t: int) -> Tensor:
    return -q.advantage[b, t] * q.x[b, t]


FORMULAS: dict[str, Callable[[Batch, int, int], Tensor]] = {
    "dapo": clipped_ratio,
    "grpo": clipped_ratio,
    "bnpo": clipped_ratio,
    "dr_grpo": clipped_ratio,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "luspo": luspo,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "gpg": reinforce,
    "reinforce": reinforce,
}
LENGTH = 16.0
# What the sum over a sequence's kept tokens is divided by, and whether by the batch's count.
BY_SEQUENCE = {"grpo", "gspo", "gspo_token", "gmpo", "sapo", "luspo", "dr_grpo"}
OVER_ALL = {"gspo", "gspo_token", "luspo", "vespo"}


def loss(
    name: str, x: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, selected: Tensor
) -> Tensor:
    """The loss by its name, with all options as they are by default; Dr. GRPO's length is LENGTH.

    What is not kept is a constant.
    """
    kept = mask & selected
    constant = torch.where(kept, x, x.detach())
    q = Batch(constant, old, advantage, mask if name in OVER_ALL else kept)
    sums = []
    for b in range(x.shape[0]):
        tokens = [FORMULAS[name](q, b, t) for t in range(x.shape[1]) if kept[b, t]]
        sums.append(sum(tokens, x.new_zeros(())))
    counts = kept.sum(1).clamp_min(1)
    if name not in BY_SEQUENCE:
        return sum(sums) / kept.sum().clamp_min(1)
    if name in ("luspo", "dr_grpo"):
        counts = torch.full_like(counts, LENGTH if name == "dr_grpo" else 1)
    return sum(s / c for s, c in zip(sums, counts, strict=True)) / mask.any(1).sum().clamp_min(1)
