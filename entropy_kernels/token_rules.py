"""Rules of the literature that pick, weigh or reshape tokens, beyond the top entropies.

Each takes statistics of the tokens and returns a mask, clip ranges or advantages for `ratio_loss`
and `high_entropy_policy_loss`; none is differentiated. max_prob, sum_p2 and sum_p2_logp are
statistics of `linear_logprob_entropy`: the largest p, sum_j p_j^2 and sum_j p_j^2 log p_j over the
vocabulary. Means and counts are those of the call's tokens.

A mask holds every token with a NaN, so that it shows in the loss; a number made of one is NaN.
"""

import torch
from torch import Generator, Tensor

from ._arguments import (
    check_advantage,
    check_finite,
    check_fraction,
    check_generator,
    check_number,
    check_tensor,
    shown,
)
from ._shapes import Bool, Float


def covariance(
    logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens"]:
    """(A_t - mean A)(log pi_t - mean log pi), means over `mask`; 0 outside.

    The Entropy Mechanism (arXiv 2505.22617): an update of a token with a large one
    lowers the entropy most. advantage: one per token, or [B] of [B, L].
    """
    _check({"logprob": logprob}, {"mask": mask})
    advantage = _per_token(advantage, logprob, "logprob")
    centred = [torch.where(mask, x - _mean(x, mask), 0.0) for x in (advantage, logprob.detach())]
    return centred[0] * centred[1]


def clip_cov(
    logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    clipped: Bool[Tensor, "*tokens"] | None = None,
    generator: Generator | None = None,
) -> Bool[Tensor, "*tokens"]:
    """Clip-Cov: `mask` without max(1, floor(fraction n)) random tokens of low < covariance < high.

    arXiv 2505.22617, and verl's clip_cov: there the tokens lose their loss and stay in the
    denominator, so give it as `token_weight=`. Tokens that are `clipped` anyway are not drawn.
    """
    check_fraction(fraction)
    for name, bound in {"low": low, "high": high}.items():
        check_number(name, bound, "a number", lambda x: x == x)
    score = covariance(logprob, advantage, mask)
    if clipped is not None:
        check_tensor("clipped", clipped, "bool", logprob, "logprob")
    check_generator(generator, logprob, "logprob")
    drawn = mask & (score > low) & (score < high)
    drawn = drawn if clipped is None else drawn & ~clipped
    lot = torch.rand(score.shape, generator=generator, device=score.device)
    return mask & ~_largest(lot, drawn, _count(mask, fraction))


def kl_cov(
    logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    fraction: float = 2e-4,
) -> Bool[Tensor, "*tokens"]:
    """KL-Cov: the max(1, floor(fraction n)) tokens of largest covariance, which get a KL penalty.

    arXiv 2505.22617, and verl's kl_cov: the penalty is |log r| against the old policy, and r is not
    clipped: `ratio_loss(..., clip_low=1, clip_high=math.inf, reference_logprob=old_logprob,
    kl_type="abs", kl_coef=kl_cov(...).float())`. Tokens with a NaN are picked besides.
    """
    check_fraction(fraction)
    picked = _largest(covariance(logprob, advantage, mask), mask, _count(mask, fraction))
    broken = logprob.isnan() | _per_token(advantage, logprob, "logprob").isnan()
    return picked | (mask & broken)


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
    _check({"entropy": entropy})
    check_finite("alpha", alpha)
    check_number("kappa", kappa, "a number > 0", lambda x: x > 0)
    advantage = _per_token(advantage, entropy, "entropy")
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


def select_token(
    logprob: Float[Tensor, "*tokens"],
    max_prob: Float[Tensor, "*tokens"],
    sum_p2: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    below: float = 0.5,
) -> Bool[Tensor, "*tokens"]:
    """SelectToken: max_j p_j < below, and the sampled token likelier than the average sample.

    p > sum_j p_j^2 = E_p[p]; from the fork of the paper's code by X. Zhao.
    """
    _check({"logprob": logprob, "max_prob": max_prob, "sum_p2": sum_p2}, {"mask": mask})
    check_number("below", below, "a probability, in (0, 1]", lambda x: 0 < x <= 1)
    broken = max_prob.isnan() | logprob.isnan() | sum_p2.isnan()
    return mask & (broken | ((max_prob < below) & (logprob.exp() > sum_p2)))


def discriminator(
    logprob: Float[Tensor, "*tokens"], entropy: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """S = p (H + log p) of the sampled token: a step of size e on its logit changes H by -e S.

    Entropy Dynamics (arXiv 2602.03392), theorem 3.2.
    """
    _check({"logprob": logprob, "entropy": entropy})
    logprob, entropy = logprob.detach(), entropy.detach()
    return logprob.exp() * (entropy + logprob)


def expected_discriminator(
    entropy: Float[Tensor, "*tokens"],
    sum_p2: Float[Tensor, "*tokens"],
    sum_p2_logp: Float[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens"]:
    """E_p[S] = H sum p^2 + sum p^2 log p: a policy gradient step changes H by -e A (S - E_p[S]).

    Arithmetic on what the head returns; arXiv 2602.03392, theorem 3.3.
    """
    _check({"entropy": entropy, "sum_p2": sum_p2, "sum_p2_logp": sum_p2_logp})
    return entropy.detach() * sum_p2 + sum_p2_logp


def clip_discriminator(
    score: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    centre: Float[Tensor, "*tokens"] | None = None,
    mu: float = 2.5,
) -> Bool[Tensor, "*tokens"]:
    """`mask` without tokens with A < 0 and score - centre more than mu deviations below zero.

    arXiv 2602.03392. Clip_B: the centre is the mean of the discriminators over `mask`, as in its
    released code, which clips this one side. Clip_V: centre=expected_discriminator(...), with the
    deviation of the differences; of it no code was released. Give the result as `selected=`.
    """
    centres = {} if centre is None else {"centre": centre}
    _check({"score": score} | centres, {"mask": mask})
    check_number("mu", mu, "a number >= 0", lambda x: x >= 0)
    a_token = _per_token(advantage, score, "score")
    z = score - (_mean(score, mask) if centre is None else centre)
    deviation = _mean((z - _mean(z, mask)).square(), mask).sqrt()
    return mask & ~((a_token < 0) & (z < -mu * deviation))


def _check(tokens: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> None:
    """Floating-point tensors and bool masks, all of the shape of the first."""
    of, like = next(iter(tokens.items()))
    check_tensor(of, like, "floating-point")
    for name, x in tokens.items():
        check_tensor(name, x, "floating-point", like, of)
    for name, x in (masks or {}).items():
        check_tensor(name, x, "bool", like, of)


def _per_token(advantage: Tensor, like: Tensor, of: str) -> Tensor:
    check_advantage(advantage, like, of)
    a_token = advantage.shape == like.shape
    return advantage if a_token else advantage.unsqueeze(1).expand_as(like)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x.detach(), 0.0).sum() / mask.sum().clamp_min(1)


def _count(mask: Tensor, fraction: float) -> Tensor:
    return (mask.sum().double() * fraction).floor().clamp_min(1)


def _largest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` tokens of `among` with the largest score, the first of equals."""
    order = score.masked_fill(~among, -torch.inf).flatten().argsort(descending=True, stable=True)
    place = torch.arange(order.numel(), device=order.device)
    rank = torch.empty_like(order).scatter(0, order, place)
    return among & (rank.view(score.shape) < count)
