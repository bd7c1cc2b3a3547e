"""Masks of tokens to train on, from their statistics. A mask holds every token with a NaN."""

import math

import torch
from torch import Generator, Tensor

from .._arguments import check_fraction, check_generator, check_number, check_tensor, shown
from .._shapes import Bool, Float
from ._tokens import check_tokens, count_of, largest, mean_over, per_token
from .scores import covariance


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
    return mask & ~largest(lot, drawn, count_of(mask, fraction))


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
    picked = largest(covariance(logprob, advantage, mask), mask, count_of(mask, fraction))
    broken = logprob.isnan() | per_token(advantage, logprob, "logprob").isnan()
    return picked | (mask & broken)


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
    check_tokens({"logprob": logprob, "max_prob": max_prob, "sum_p2": sum_p2}, {"mask": mask})
    check_number("below", below, "a probability, in (0, 1]", lambda x: 0 < x <= 1)
    broken = max_prob.isnan() | logprob.isnan() | sum_p2.isnan()
    return mask & (broken | ((max_prob < below) & (logprob.exp() > sum_p2)))


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
    check_tokens({"score": score} | centres, {"mask": mask})
    check_number("mu", mu, "a number >= 0", lambda x: x >= 0)
    a_token = per_token(advantage, score, "score")
    z = score - (mean_over(score, mask) if centre is None else centre)
    deviation = mean_over((z - mean_over(z, mask)).square(), mask).sqrt()
    return mask & ~((a_token < 0) & (z < -mu * deviation))


def silence_spurious(
    logprob: Float[Tensor, "*tokens"],
    entropy: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    threshold: Float[Tensor, ""],
    *,
    below: float = 0.002,
) -> Bool[Tensor, "*tokens"]:
    """STAPO: `mask` without tokens of A > 0, p < below and H < threshold, about 0.01% of all.

    arXiv 2602.15620: rare tokens of certain distributions, in responses that were right. The loss
    divides by the number of those left: give them as `selected=`. The paper has p < 0.002. Its
    threshold is the 80th percentile of the batch's entropies, `entropy_threshold(fraction=0.2)`.
    We know both from summaries; one reads the 20th percentile in another section of the paper.
    """
    check_tokens({"logprob": logprob, "entropy": entropy}, {"mask": mask})
    check_number("below", below, "a probability, in (0, 1]", lambda x: 0 < x <= 1)
    check_tensor("threshold", threshold, "floating-point")
    if threshold.numel() != 1:
        raise ValueError(f"threshold must be one value; got {shown(threshold)}")
    rare = logprob.detach() < math.log(below)
    certain = entropy.detach() < threshold
    return mask & ~(rare & certain & (per_token(advantage, logprob, "logprob") > 0))


def surprisal_band(
    logprob: Float[Tensor, "*tokens"],
    entropy: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    low: float = 0.5,
    high: float = 2.0,
) -> Bool[Tensor, "*tokens"]:
    """RSI-S: low <= -log p / H <= high, surprise neither redundant nor of the tail.

    arXiv 2606.31575. The index is 1 for a token that surprises as much as is expected, and 0 where
    H = 0. We have not found the paper's interval: both bounds are ours. Give the result as
    `selected=`.
    """
    check_tokens({"logprob": logprob, "entropy": entropy}, {"mask": mask})
    check_number("low", low, "a number >= 0", lambda x: x >= 0)
    check_number("high", high, "a number of at least low", lambda x: x >= low)
    surprisal, entropy = -logprob.detach(), entropy.detach()
    index = torch.where(entropy == 0, 0.0, surprisal / entropy)
    # A NaN is in no interval, and so not outside of this one.
    return mask & ~((index < low) | (index > high))
