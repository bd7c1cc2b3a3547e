"""Rules of the literature that pick, weigh or reshape tokens, beyond the top entropies.

Each takes statistics of the tokens and returns scores, a mask, weights, clip ranges or advantages
for `ratio_loss` and `high_entropy_policy_loss`; none is differentiated. max_prob, sum_p2 and
sum_p2_logp are statistics of `linear_logprob_entropy`: the largest p, sum_j p_j^2 and
sum_j p_j^2 log p_j over the vocabulary. Means and counts are those of the call's tokens.

A mask holds every token with a NaN, so that it shows in the loss; a number made of one is NaN.
"""

from .draws import random_prefixes, random_tokens
from .masks import (
    clip_cov,
    clip_discriminator,
    kl_cov,
    select_token,
    silence_spurious,
    surprisal_band,
)
from .reshaped import entropy_advantage, two_clip_ranges
from .scores import covariance, discriminator, expected_discriminator, gradient_magnitude

__all__ = [
    "clip_cov",
    "clip_discriminator",
    "covariance",
    "discriminator",
    "entropy_advantage",
    "expected_discriminator",
    "gradient_magnitude",
    "kl_cov",
    "random_prefixes",
    "random_tokens",
    "select_token",
    "silence_spurious",
    "surprisal_band",
    "two_clip_ranges",
]
