"""Numbers that rank tokens; none is differentiated."""

import torch
from torch import Tensor

from .._arguments import check_finite, check_number
from .._shapes import Bool, Float
from ..losses import bounded
from ._tokens import check_tokens, mean_over, per_token


def covariance(
    logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens"]:
    """(A_t - mean A)(log pi_t - mean log pi), means over `mask`; 0 outside.

    The Entropy Mechanism (arXiv 2505.22617): an update of a token with a large one
    lowers the entropy most. advantage: one per token, or [B] of [B, L].
    """
    check_tokens({"logprob": logprob}, {"mask": mask})
    advantage = per_token(advantage, logprob, "logprob")
    centred = [
        torch.where(mask, x - mean_over(x, mask), 0.0) for x in (advantage, logprob.detach())
    ]
    return centred[0] * centred[1]


def discriminator(
    logprob: Float[Tensor, "*tokens"], entropy: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """S = p (H + log p) of the sampled token: a step of size e on its logit changes H by -e S.

    Entropy Dynamics (arXiv 2602.03392), theorem 3.2.
    """
    check_tokens({"logprob": logprob, "entropy": entropy})
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
    check_tokens({"entropy": entropy, "sum_p2": sum_p2, "sum_p2_logp": sum_p2_logp})
    return entropy.detach() * sum_p2 + sum_p2_logp


def gradient_magnitude(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    entropy: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "..."],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reference_logprob: Float[Tensor, "*tokens"] | None = None,
    kl_coef: float = 0.0,
) -> Float[Tensor, "*tokens"]:
    """|H w|, w = r A I + kl_coef (pi_ref / pi - 1): what log pi's gradient is multiplied by.

    GMTS (arXiv 2608.30632; OpenReview JGvOicAo3g): H stands for the norm of that gradient. I is 0
    where the ratio r = pi / pi_old is clipped, r > 1 + clip_high with A > 0 or r < 1 - clip_low
    with A < 0. The KL is the k3 estimate. The paper trains on the top 20% of the scores and divides
    by their number: `selected=top_entropy_mask(score, mask, 0.2)`. Its clips are 0.2 and 0.28.
    """
    reference = {} if reference_logprob is None else {"reference_logprob": reference_logprob}
    tokens = {"logprob": logprob, "old_logprob": old_logprob, "entropy": entropy} | reference
    check_tokens(tokens)
    for name, clip in {"clip_low": clip_low, "clip_high": clip_high}.items():
        check_number(name, clip, "a number >= 0", lambda x: x >= 0)
    check_finite("kl_coef", kl_coef)
    if kl_coef and reference_logprob is None:
        raise ValueError(f"kl_coef needs reference_logprob; got kl_coef={kl_coef} without one")
    advantage, logprob = per_token(advantage, logprob, "logprob").detach(), logprob.detach()
    ratio = bounded(logprob - old_logprob.detach()).exp()
    over, under = ratio > 1 + clip_high, ratio < 1 - clip_low
    clipped = ((advantage > 0) & over) | ((advantage < 0) & under)
    weight = torch.where(clipped, 0.0, ratio * advantage)
    if reference_logprob is not None:
        weight = weight + kl_coef * (bounded(reference_logprob.detach() - logprob).exp() - 1)
    return (entropy.detach() * weight).abs()
