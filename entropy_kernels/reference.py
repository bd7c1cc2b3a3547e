"""The specification: one plain PyTorch function per op, in the precision of its inputs.

Every other path is tested against these functions in fp64. They hold [T, V] logits, take a head
with hidden [T, D] and target [T], loop where a loop is clearer, and autograd differentiates them.
Paper: "Beyond the 80/20 Rule", arXiv 2506.01939v2.

T tokens, D hidden, V vocabulary.
"""

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .head import Head
from .support import Support

LOG_RATIO_BOUND = 20.0


def linear_logprob_entropy(
    head: Head, support: Support | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, entropy of each distribution, and log-sum-exp.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature,   p = softmax(z)
    logprob_t = log p[target_t],   H_t = -sum_j p_j log p_j   (paper, equation 1; nats)

    Rows whose target is `ignore_index` give zeros and carry no gradient. With a `support` z is -inf
    outside of a row's set.
    """
    z_TV = _logits(head, support)
    logsumexp_T = z_TV.logsumexp(1)
    # A row of -inf throughout has no distribution, nor has one with inf.
    logsumexp_T = torch.where(logsumexp_T.isfinite(), logsumexp_T, torch.nan)
    logp_TV = z_TV.log_softmax(1)
    # p log p is 0 where p is 0, and its derivative there is taken as 0 too.
    plogp_TV = torch.where(logp_TV == -torch.inf, 0.0, logp_TV.exp() * logp_TV.clamp_min(-1e4))
    entropy_T = -plogp_TV.sum(1)
    valid_T = head.target != head.ignore_index
    logprob_T = logp_TV.gather(1, head.target.where(valid_T, 0).unsqueeze(1)).squeeze(1)

    zero = z_TV.new_zeros(())
    return (
        torch.where(valid_T, logprob_T, zero),
        torch.where(valid_T, entropy_T, zero),
        torch.where(valid_T, logsumexp_T, zero),
    )


def head_statistics(
    head: Head, support: Support | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Varentropy, largest probability, sum of p^2, sum of p^2 log p, mean logit, and whether the
    target is the most probable token, of the same distributions.

    varentropy_t = Var_p(log p) = sum_j p_j (log p_j + H_t)^2 = sum_j p_j (log p_j)^2 - H_t^2
    max_prob_t = max_j p_j,   sum_p2_t = sum_j p_j^2,   sum_p2_logp_t = sum_j p_j^2 log p_j
    mean_logit_t = sum_j z_j / V,   is_top1_t = [argmax_j z_j = target_t], the first of equals

    in nats^2, 1, 1, nats and nats; is_top1 is 1 or 0. sum_p2 is the probability that two samples
    agree; H sum_p2 + sum_p2_logp is the expectation under p of p_j (log p_j + H), the discriminator
    of entropy changes (arXiv 2602.03392). Rows whose target is `ignore_index` give zeros.
    """
    z_TV = _logits(head, support)
    logp_TV = z_TV.log_softmax(1)
    p_TV = logp_TV.exp()
    # Where p is 0 every term is, whatever its log.
    logp_TV = torch.where(p_TV == 0, 0.0, logp_TV)
    entropy_T = -(p_TV * logp_TV).sum(1, keepdim=True)
    # NaN where a row has no distribution.
    no_answer_T = 0 * p_TV.amax(1)
    statistics = (
        (p_TV * (logp_TV + entropy_T).square()).sum(1),
        p_TV.amax(1),
        p_TV.square().sum(1),
        (p_TV.square() * logp_TV).sum(1),
        (z_TV / z_TV.shape[1]).sum(1) + no_answer_T,
        (z_TV.argmax(1) == head.target) + no_answer_T,
    )
    ignored_T = head.target == head.ignore_index
    varentropy_T, max_prob_T, sum_p2_T, sum_p2_logp_T, mean_logit_T, is_top1_T = (
        torch.where(ignored_T, 0.0, x) for x in statistics
    )
    return varentropy_T, max_prob_T, sum_p2_T, sum_p2_logp_T, mean_logit_T, is_top1_T


def token_logprobs(head: Head, token_ids: Tensor) -> Tensor:
    """Log-probabilities of chosen ids in every row, [T, K].

    token_logprobs_tk = log p[id_tk], or log p[id_k] of ids that all rows share, of the same
    distributions. Rows whose target is `ignore_index` give zeros, whatever their ids.
    """
    logp_TV = _logits(head, None).log_softmax(1)
    valid_T1 = (head.target != head.ignore_index).unsqueeze(1)
    ids_TK = token_ids.expand(len(logp_TV), -1).where(valid_T1, 0)
    return torch.where(valid_T1, logp_TV.gather(1, ids_TK), logp_TV.new_zeros(()))


def _logits(head: Head, support: Support | None) -> Tensor:
    """softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature; -inf outside of a set."""
    z_TV = head.hidden @ head.weight.T
    if head.bias is not None:
        z_TV = z_TV + head.bias
    z_TV = head.logit_scale * z_TV
    if head.softcap is not None:
        z_TV = head.softcap * torch.tanh(z_TV / head.softcap)
    temperature = 1.0 if head.temperature is None else head.temperature
    z_TV = z_TV / torch.as_tensor(temperature, device=z_TV.device, dtype=z_TV.dtype).reshape(-1, 1)
    if support is None:
        return z_TV
    inside_TV = torch.zeros_like(z_TV, dtype=torch.bool)
    for t, (begin, end) in enumerate(zip(support.offsets, support.offsets[1:], strict=False)):
        inside_TV[t, support.token_ids[begin:end].long()] = True
    return z_TV.where(inside_TV, -torch.inf)


def ratio_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor | None,
    advantage_BL: Tensor,
    mask_BL: Tensor,
    selected_BL: Tensor,
    loss_type: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    denominator: str | float = "selected",
) -> Tensor:
    """The clipped policy loss over the selected tokens, token by token.

    r_t = exp(logprob_t - old_logprob_t)
    loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    and, with dual clip c, for A_t < 0: min(loss_t, -c A_t).

    "dapo" (paper, equation 6; DAPO, arXiv 2503.14476): sum of loss_t over the selected tokens,
    over the number of selected (or all, or a given number of) tokens.
    "grpo" (DeepSeekMath, arXiv 2402.03300): for each sequence the same with its own count, then
    the mean over the sequences that have a token of the loss mask.

    A selected NaN, of any input, makes the loss NaN and the gradient of its token.
    """
    sums, counts = [], []
    for b in range(logprob_BL.shape[0]):
        sequence_sum = logprob_BL.new_zeros(())
        for t in range(logprob_BL.shape[1]):
            if not (mask_BL[b, t] and selected_BL[b, t]):
                continue
            new = logprob_BL[b, t]
            old = new.detach() if old_logprob_BL is None else old_logprob_BL[b, t]
            ratio = (new - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
            advantage = advantage_BL[b, t]
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            loss = -torch.minimum(ratio * advantage, clipped * advantage)
            if dual_clip is not None and advantage < 0:
                loss = torch.minimum(loss, -dual_clip * advantage)
            if loss.isnan():
                loss = new * torch.nan  # clamp gives a NaN no gradient
            sequence_sum = sequence_sum + loss
        sums.append(sequence_sum)
        counted = mask_BL[b] if denominator == "all" else mask_BL[b] & selected_BL[b]
        counts.append(int(counted.sum()))

    if loss_type == "grpo":
        present = max(int(mask_BL.any(1).sum()), 1)
        terms = [s / max(c, 1) for s, c in zip(sums, counts, strict=True)]
        return torch.stack(terms).sum() / present
    total = denominator if not isinstance(denominator, str) else max(sum(counts), 1)
    return torch.stack(sums).sum() / total


def high_entropy_policy_loss(
    head: Head,
    old_logprob_T: Tensor | None,
    advantage_T: Tensor,
    mask_T: Tensor,
    fraction: float = 0.2,
    support: Support | None = None,
    **ratio: Any,
) -> Tensor:
    """Equation 6 of the paper on one batch: select the top entropies, then the clipped loss.

    The selection itself carries no gradient. A target of ignore_index is no token. With a `support`
    the policy is that over each token's set.
    """
    mask_T = mask_T & (head.target != head.ignore_index)
    logprob_T, entropy_T, _ = linear_logprob_entropy(head, support)
    selected_T = top_entropy_mask(entropy_T.detach(), mask_T, fraction)
    old = None if old_logprob_T is None else old_logprob_T[None]
    return ratio_loss(
        logprob_T[None], old, advantage_T[None], mask_T[None], selected_T[None], **ratio
    )


def entropy_threshold(entropy: Tensor, mask: Tensor | None = None, fraction: float = 0.2) -> Tensor:
    """tau of equation 6 (section 5.1): the k-th largest entropy of the n tokens of `mask`.

    k = max(1, ceil(fraction * n)), with `fraction` read as the decimal it is written as. A NaN
    ranks above every number. The threshold of no token at all is +inf.
    """
    valid = entropy.flatten() if mask is None else entropy[mask]
    if valid.numel() == 0:
        return entropy.new_full((), torch.inf)
    k = max(1, math.ceil(Fraction(repr(fraction)) * valid.numel()))
    return valid.sort(descending=True).values[k - 1]


def top_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    fraction: float = 0.2,
    scope: str = "batch",
    which: str = "top",
    ties: str = "exact",
) -> Tensor:
    """The indicator I[H >= tau] of equation 6 (section 5.1), true for the tokens to train on.

    `ties="exact"` selects k = max(1, ceil(fraction * n)) tokens, the first of those that tie at
    tau; `ties="threshold"` selects them all. `which="bottom"` ranks by -H. `scope="sequence"`
    selects in each row by itself.
    """
    if scope == "sequence":
        masks = [None] * len(entropy) if mask is None else mask
        rows = [
            top_entropy_mask(h, m, fraction, which=which, ties=ties)
            for h, m in zip(entropy, masks, strict=True)
        ]
        return torch.stack(rows) if rows else torch.zeros_like(entropy, dtype=torch.bool)
    score = -entropy if which == "bottom" else entropy
    valid = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask
    if ties == "threshold":
        return valid & (score.isnan() | (score >= entropy_threshold(score, mask, fraction)))
    index = valid.flatten().nonzero().squeeze(1)
    order = index[score.flatten()[index].sort(descending=True, stable=True).indices]
    selected = torch.zeros_like(valid).flatten()
    selected[order[: max(1, math.ceil(Fraction(repr(fraction)) * len(order)))]] = True
    return selected.view(entropy.shape)
