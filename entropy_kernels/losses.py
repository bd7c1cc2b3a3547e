"""The policy losses of the literature, a function each, on per-token log-probabilities.

    loss(logprob, old_logprob, advantage, mask, *, options) -> the loss of each token

All four are [*tokens], and [B, L] where a loss sums over sequences. `mask` says which tokens those
sums run over; elsewhere the inputs are finite and the result is not used. Only logprob carries
gradient. `ratio_loss` takes such a function as its `loss_type`: one of these by its name, with
other options as `functools.partial(losses.sapo, tau_neg=1.1)`, or one of your own. It masks, weighs
and aggregates. A token that a loss gives no gradient gets exactly 0.

Losses that sum over a sequence take the ranks that share its tokens as `sequence_group`; with one,
mask and tensors are this rank's part of each sequence.

r_t = exp(logprob_t - old_logprob_t), |log r_t| <= 20; sg is stop-gradient. B sequences, L tokens.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_loss_option, check_tensor
from ._shapes import Bool, Float
from .distributed import all_reduce_sum, sum_over_ranks

# |log ratio| is clamped here before exp, as verl does; beyond, the ratio is meaningless.
LOG_RATIO_BOUND = 20.0

Loss = Callable[..., Tensor]
Clip = float | Float[Tensor, "..."]


def _checked(loss: Loss) -> Loss:
    """A loss whose arguments are looked at first: tensors of one shape, options in their ranges."""
    over_sequences = "sequence_group" in inspect.signature(loss).parameters

    @functools.wraps(loss)
    def checked(
        logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, **options: Any
    ) -> Tensor:
        check_tensor("logprob", logprob, "floating-point")
        for name, x in {"old_logprob": old_logprob, "advantage": advantage}.items():
            check_tensor(name, x, "floating-point", logprob, "logprob")
        check_tensor("mask", mask, "bool", logprob, "logprob")
        if over_sequences and logprob.ndim != 2:
            raise ValueError(f"logprob must be [B, L]; got {tuple(logprob.shape)}")
        for name, value in options.items():
            check_loss_option(name, value, logprob)
        return loss(logprob, old_logprob, advantage, mask, **options)

    return checked


@_checked
def clipped_ratio(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    clip_low: Clip = 0.2,
    clip_high: Clip = 0.28,
    dual_clip: float | None = None,
) -> Float[Tensor, "*tokens"]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), for A < 0 at most -dual_clip A.

    PPO (arXiv 1707.06347), GRPO (2402.03300, both clips 0.2), DAPO (2503.14476); dual clip
    1912.09729. INTELLECT-2's two-sided delta (2505.07291) is dual_clip = delta >= 1 + clip_high.
    """
    return _clipped(_ratio(logprob, old_logprob), advantage, clip_low, clip_high, dual_clip)


@_checked
def gspo(
    logprob: Float[Tensor, "B L"],
    old_logprob: Float[Tensor, "B L"],
    advantage: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    clip_low: Clip = 3e-4,
    clip_high: Clip = 4e-4,
    sequence_group: ProcessGroup | None = None,
) -> Float[Tensor, "B L"]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean_t log r_t) of the sequence.

    GSPO, arXiv 2507.18071; a clipped sequence has no gradient at all.
    """
    ratio_B1 = bounded(_mean(logprob - old_logprob, mask, sequence_group)).exp()
    return _clipped(ratio_B1, advantage, clip_low, clip_high)


@_checked
def gspo_token(
    logprob: Float[Tensor, "B L"],
    old_logprob: Float[Tensor, "B L"],
    advantage: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    clip_low: Clip = 3e-4,
    clip_high: Clip = 4e-4,
    sequence_group: ProcessGroup | None = None,
) -> Float[Tensor, "B L"]:
    """As `gspo` with s_t = sg(s) pi_t / sg(pi_t): its value, but a gradient of each token's own.

    GSPO-token, arXiv 2507.18071: for advantages that differ within a sequence.
    """
    log_ratio_B1 = bounded(_mean(logprob - old_logprob, mask, sequence_group)).detach()
    ratio = (logprob - logprob.detach() + log_ratio_B1).exp()
    return _clipped(ratio, advantage, clip_low, clip_high)


@_checked
def luspo(
    logprob: Float[Tensor, "B L"],
    old_logprob: Float[Tensor, "B L"],
    advantage: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    clip_low: Clip = 2e-3,
    clip_high: Clip = 2.5e-3,
    sequence_group: ProcessGroup | None = None,
) -> Float[Tensor, "B L"]:
    """As `gspo`; summed over the tokens of a sequence, the loss is |o| times GSPO's.

    LUSPO, arXiv 2602.05261.
    """
    options = {"clip_low": clip_low, "clip_high": clip_high}
    return gspo(logprob, old_logprob, advantage, mask, **options, sequence_group=sequence_group)


@_checked
def gmpo(
    logprob: Float[Tensor, "B L"],
    old_logprob: Float[Tensor, "B L"],
    advantage: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    clip_low: Clip = 0.4,
    clip_high: Clip = 0.4,
    sequence_group: ProcessGroup | None = None,
) -> Float[Tensor, "B L"]:
    """-exp(mean_t c_t) A, c = min(l, clip(l, -clip_low, clip_high)), max where A <= 0; l = log r.

    GMPO, arXiv 2507.20673: a geometric mean of ratios, each clipped to (e^-0.4, e^0.4).
    """
    log_ratio = logprob - old_logprob
    clipped = _clamp(log_ratio, -clip_low, clip_high)
    least, most = torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped)
    worst = torch.where(advantage > 0, least, most)
    return -bounded(_mean(worst, mask, sequence_group)).exp() * advantage


@_checked
def cispo(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    clip_low: Clip = 1.0,
    clip_high: Clip = 4.0,
) -> Float[Tensor, "*tokens"]:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: no token loses its gradient.

    CISPO, arXiv 2506.13585, without a lower bound; 5 as the upper one follows ScaleRL (2510.13786).
    TRL's epsilon_high is that bound itself, 1 + clip_high here.
    """
    weight = _clamp(_ratio(logprob, old_logprob), 1 - clip_low, 1 + clip_high)
    return _reinforce(weight * advantage, logprob)


@_checked
def sapo(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Float[Tensor, "*tokens"]:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg.

    SAPO, arXiv 2511.20347: a gate in place of the clip, of slope 1 at r = 1.
    """
    tau = _choose(advantage > 0, tau_pos, tau_neg, advantage)
    return -4 / tau * torch.sigmoid(tau * (_ratio(logprob, old_logprob) - 1)) * advantage


@_checked
def vespo(
    logprob: Float[Tensor, "B L"],
    old_logprob: Float[Tensor, "B L"],
    advantage: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    sequence_group: ProcessGroup | None = None,
) -> Float[Tensor, "B L"]:
    """-sg(W^k exp(lambda (1 - W))) A log pi, W = prod_t r_t of the sequence, in [1e-8, e^20].

    VESPO, arXiv 2602.10693; k and lambda by the sign of A.
    """
    log_ratio = torch.where(mask, bounded(logprob - old_logprob), 0.0)
    log_w = all_reduce_sum(log_ratio.sum(1, keepdim=True), sequence_group)
    log_w = log_w.clamp(math.log(1e-8), LOG_RATIO_BOUND)
    k = _choose(advantage >= 0, k_pos, k_neg, advantage)
    rate = _choose(advantage >= 0, lambda_pos, lambda_neg, advantage)
    return _reinforce((rate + k * log_w - rate * log_w.exp()).exp() * advantage, logprob)


@_checked
def dppo_tv(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    clip_low: Clip = 0.15,
    clip_high: Clip = 0.15,
    cap: float = 20.0,
) -> Float[Tensor, "*tokens"]:
    """-sg(min(r, cap)) A log pi; 0 where A > 0 and pi - pi_old > clip_high, or mirrored.

    DPPO-Binary-TV, arXiv 2602.04879: what the probability moved by, not its ratio, ends the trust.
    """
    moved = logprob.exp() - old_logprob.exp()
    outside = torch.where(advantage > 0, moved > clip_high, moved < -clip_low)
    weight = _ratio(logprob, old_logprob).clamp(max=cap) * advantage
    return _reinforce(torch.where(outside, 0.0, weight), logprob)


@_checked
def dppo_kl(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    clip_low: Clip = 0.05,
    clip_high: Clip = 0.05,
    cap: float = 20.0,
) -> Float[Tensor, "*tokens"]:
    """As `dppo_tv`, by KL(old || new) of the token against all others; 1e-8 keeps its log finite.

    DPPO-Binary-KL, arXiv 2602.04879.
    """
    new, old = logprob.exp(), old_logprob.exp()
    others = (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
    divergence = old * (old_logprob - logprob) + others
    rose = (divergence > clip_high) & (new > old)
    fell = (divergence > clip_low) & (new < old)
    weight = _ratio(logprob, old_logprob).clamp(max=cap) * advantage
    outside = torch.where(advantage > 0, rose, fell)
    return _reinforce(torch.where(outside, 0.0, weight), logprob)


@_checked
def reinforce(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"],
    advantage: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens"]:
    """-A log pi: REINFORCE, and GPG (arXiv 2504.02546) with its advantages. No ratio."""
    return _reinforce(advantage, logprob)


# The name of each loss: its function, and how its tokens are summed unless told otherwise.
LOSSES: dict[str, tuple[Loss, str]] = {
    "dapo": (clipped_ratio, "token-mean"),
    "grpo": (clipped_ratio, "seq-mean-token-mean"),
    "bnpo": (clipped_ratio, "token-mean"),
    "dr_grpo": (clipped_ratio, "seq-mean-token-sum-norm"),
    "gspo": (gspo, "seq-mean-token-mean"),
    "gspo_token": (gspo_token, "seq-mean-token-mean"),
    "luspo": (luspo, "seq-mean-token-sum"),
    "gmpo": (gmpo, "seq-mean-token-mean"),
    "cispo": (cispo, "token-mean"),
    "sapo": (sapo, "seq-mean-token-mean"),
    "vespo": (vespo, "token-mean"),
    "dppo_tv": (dppo_tv, "token-mean"),
    "dppo_kl": (dppo_kl, "token-mean"),
    "gpg": (reinforce, "token-mean"),
    "reinforce": (reinforce, "token-mean"),
}
# Those that sum over a sequence, and over which of its tokens.
SEQUENCE_OVER = {gspo: "all", gspo_token: "all", luspo: "all", vespo: "all", gmpo: "selected"}


def bounded(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """Clamped to LOG_RATIO_BOUND on both sides, without gradient beyond."""
    check_tensor("log_ratio", log_ratio, "floating-point")
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    return bounded(logprob - old_logprob).exp()


def _clamp(x: Tensor, low: Clip, high: Clip) -> Tensor:
    """In two steps, as one bound may be a number and the other a tensor."""
    return x.clamp(min=low).clamp(max=high)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """In the precision of `like`, which torch.where of two numbers has not."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def _mean(x_BL: Tensor, mask_BL: Tensor, group: ProcessGroup | None) -> Tensor:
    """[B, 1], over a sequence's tokens on all ranks of `group`; 0 for an empty sequence."""
    total_B1 = torch.where(mask_BL, x_BL, 0.0).sum(1, keepdim=True)
    count_B1 = all_reduce_sum(mask_BL.sum(1, keepdim=True), group)
    return sum_over_ranks(total_B1, group) / count_B1.clamp_min(1)


def _clipped(
    ratio: Tensor, advantage: Tensor, low: Clip, high: Clip, dual_clip: float | None = None
) -> Tensor:
    clipped = _clamp(ratio, 1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip is None:
        return loss
    return torch.where((advantage < 0) & (ratio > dual_clip), -dual_clip * advantage, loss)


def _reinforce(weight: Tensor, logprob: Tensor) -> Tensor:
    """-sg(weight) log pi, in which 0 * -inf is 0."""
    weight = weight.detach()
    return -torch.where((weight == 0) & ~logprob.isnan(), 0.0, weight * logprob)
