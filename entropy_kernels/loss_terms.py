"""What is added to a policy loss or multiplied with it: a KL, a sampler's correction, 1 / counts.

B sequences, L tokens.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import as_scalar
from ._shapes import Bool, Float
from .distributed import all_reduce_mean, all_reduce_sum, world_size
from .losses import bounded

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
KL_TYPES = ("k1", "k2", "k3", "k1+", "k3+", "k3_corrected", "abs")
CORRECTIONS = ("tis", "mis", "sequence_truncate", "sequence_mask")


def kl_divergence(
    logprob: Float[Tensor, "*tokens"],
    reference_logprob: Float[Tensor, "*tokens"],
    kind: str,
    old_logprob: Float[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, "*tokens"]:
    """An estimate of KL(pi || reference) from each sampled token; d = logprob - reference_logprob.

    k1: d. k2: d^2 / 2. k3: exp(-d) - 1 + d, |d| <= 20 (http://joschu.net/blog/kl-approx.html).
    abs: |d|. As a loss only k2 has the gradient of the KL; k1's is 0 on average. So "k1+" and "k3+"
    have their value and k2's gradient, and "k3_corrected" is r k3, unbiased (DeepSeek-V3.2).
    """
    d = logprob - reference_logprob
    if kind in ("k1+", "k3+"):
        value = kl_divergence(logprob, reference_logprob, kind[:2]).detach()
        return value + (d.square() - d.detach().square()) / 2
    if kind == "k3_corrected":
        if old_logprob is None:
            raise ValueError('"k3_corrected" needs old_logprob')
        ratio = bounded(logprob - old_logprob).exp()
        return ratio * kl_divergence(logprob, reference_logprob, "k3")
    if kind == "k3":
        d = bounded(d)
        fall = torch.expm1(-d).detach()
        # The slope is 1 - exp(-d), which autograd would subtract after rounding exp(-d).
        return fall + d.detach() - fall * (d - d.detach())
    return {"k1": d, "abs": d.abs(), "k2": d.square() / 2}[kind]


def mismatch(
    logprob: Float[Tensor, "*tokens"],
    sampler_logprob: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    correction: str | None = None,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "*tokens"]:
    """log(pi / pi_sampler) of each token, or for "sequence_..." the sum over its sequence, whose
    tokens the ranks of `group` share; `logprob` is of the old policy or of the current one.

    Clamped to 20 on both sides. It is 0 outside of `mask` and where sampler_logprob is NaN: an
    engine that did not report one.
    """
    known = mask & ~sampler_logprob.isnan()
    log_ratio = torch.where(known, logprob - sampler_logprob, 0.0).detach()
    if correction is not None and correction.startswith("sequence"):
        total = all_reduce_sum(log_ratio.sum(1, keepdim=True), group)
        log_ratio = total.expand_as(log_ratio)
    return bounded(log_ratio)


def correction_weight(
    ratio: Float[Tensor, "*tokens"], correction: str, *, cap: float | None, floor: float | None
) -> Float[Tensor, "*tokens"]:
    """c(r): TIS clamps the ratio into [floor, cap]; MIS (IcePop) makes it 0 outside. None: no
    bound.

    TIS: fengyao.notion.site/off-policy-rl; IcePop: arXiv 2510.18855; both of tokens and sequences:
    richardli.xyz/rl-collapse. A ratio of NaN stays one.
    """
    inside = ratio.clamp(min=0.0 if floor is None else floor, max=cap)
    if correction in ("tis", "sequence_truncate"):
        return inside
    return torch.where((ratio < inside) | (ratio > inside), 0.0, ratio)


def poison(
    x: Float[Tensor, "*tokens"], broken: Bool[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """What to add to losses of `x`: NaN at the `broken` tokens, as is x's gradient there; else 0.

    By itself a NaN stays in the loss alone: clamp, abs and where give it a gradient of 0.
    """
    return torch.where(broken, x, 0.0) * torch.where(broken, torch.nan, 0.0)


def aggregation_weight(
    aggregation: str,
    mask: Bool[Tensor, "*tokens"],
    counted: Bool[Tensor, "*tokens"],
    denominator: str | float | Tensor,
    num_sequences: float | Tensor | None,
    dtype: torch.dtype,
    group: ProcessGroup | None = None,
    mean_group: ProcessGroup | None = None,
) -> Float[Tensor, " B"]:
    """What the sum of a sequence's token losses is multiplied with; [1] for "token-mean".

    1 / count; 1 / (own count x sequences); 1 / sequences; 1 / (length x sequences). Counts are
    those of the sequences as a whole, which the ranks of `group` share. With a `mean_group`, which
    has those of `group` in it, tokens and sequences counted here are the mean count per rank.
    """
    if aggregation == "token-mean":
        if isinstance(denominator, str) and mean_group is not None:
            denominator = all_reduce_mean(counted.sum(), mean_group)
        elif isinstance(denominator, str):
            denominator = all_reduce_sum(counted.sum(), group)
        return 1 / _not_zero(denominator, mask.device, dtype)
    if num_sequences is None:
        num_sequences = (all_reduce_sum(mask.sum(1), group) > 0).sum()
        if mean_group is not None:
            num_sequences = all_reduce_mean(num_sequences, mean_group) / world_size(group)
    sequences = _not_zero(num_sequences, mask.device, dtype)
    if aggregation == "seq-mean-token-mean":
        return 1 / (all_reduce_sum(counted.sum(1), group).clamp_min(1) * sequences)
    if aggregation == "seq-mean-token-sum-norm" and not isinstance(denominator, str):
        sequences = sequences * _not_zero(denominator, mask.device, dtype)
    return (1 / sequences).repeat(mask.shape[0])


def _not_zero(count: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1]; 1 in place of 0. A mean count per rank may lie between."""
    count = as_scalar(count, dtype, device).reshape(1)
    return count.masked_fill(count <= 0, 1)
