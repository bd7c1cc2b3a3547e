"""What a sampler's logits say, by plain torch in blocks of rows: entropies, and kept sets.

R rows, V vocabulary, C candidates: the largest logits of a row in order. K kept ids of all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import EXPONENT_OF_ZERO, LOWEST_EXPONENT, slices
from .selection import sort_keys

# Logits of a block: temporaries stay in a CPU's cache, and below 1 GB on a GPU.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}
# Where top-k does not say how many are looked at first, on a CPU: 16 times less work than a sort.
_FIRST = 1024


def entropy_from_logits(logits_RV: Tensor, temperature_R: Tensor | None) -> Tensor:
    """The entropy of softmax(logits / temperature) of each row, fp32 [R], in nats.

    temperature_R is fp32 [R] or [1]; None is 1. Terms are fp32, sums fp64.
    """
    entropy_R = logits_RV.new_empty(len(logits_RV), dtype=torch.float32)
    for rows in _blocks(logits_RV):
        most_R1, first_R1 = logits_RV[rows].max(1, keepdim=True)
        d_RV = _exponents(logits_RV[rows], most_R1, _at(temperature_R, rows))
        # -inf becomes finite: its term is 0.
        d_RV = torch.threshold_(d_RV, LOWEST_EXPONENT, EXPONENT_OF_ZERO)
        e_RV = d_RV.exp().scatter_(1, first_R1, 0)
        s_R = e_RV.sum(1, dtype=torch.float64)
        t_R = e_RV.mul_(d_RV).sum(1, dtype=torch.float64)
        entropy_R[rows] = s_R.log1p() - t_R / (1 + s_R)
    return entropy_R


class Limits(NamedTuple):
    """What is kept of each row, one value per row."""

    top_k: Tensor  # int64, from 1 to V
    top_p: Tensor  # fp64; 1 or more keeps all
    min_p: Tensor  # fp32; 0 or less keeps all

    def at(self, rows: slice) -> "Limits":
        return Limits(*(x[rows] for x in self))


class Kept(NamedTuple):
    """The sets of some rows, one after the other, each from its most probable id on."""

    token_ids: Tensor  # int64 [K]
    logprob: Tensor  # fp32 [K]
    sizes: Tensor  # int64 [R]
    entropy: Tensor  # fp32 [R]


def truncate(logits_RV: Tensor, temperature_R: Tensor | None, limits: Limits) -> Kept:
    """Sets, log-probs and entropies of all rows; a GPU is waited for once per block."""
    parts = []
    for rows in _blocks(logits_RV):
        block_RV, temperature, own = logits_RV[rows], _at(temperature_R, rows), limits.at(rows)
        kept = _among_largest(block_RV, temperature, own, _candidates(block_RV, own))
        if kept is None:
            kept = _among_largest(block_RV, temperature, own, block_RV.shape[1])
        assert kept is not None
        parts.append(kept)
    return Kept(*map(torch.cat, zip(*parts, strict=True)))


def _candidates(logits_RV: Tensor, limits: Limits) -> int:
    """How many of the largest logits are looked at first."""
    vocabulary = logits_RV.shape[1]
    if logits_RV.is_cuda:
        return vocabulary
    has_k_R = limits.top_k < vocabulary
    if bool((~has_k_R & (limits.top_p >= 1) & (limits.min_p <= 0)).any()):
        return vocabulary
    most = int(limits.top_k.where(has_k_R, 0).max())
    return most if bool(has_k_R.all()) else min(max(most, _FIRST), vocabulary)


def _among_largest(
    logits_RV: Tensor, temperature_R: Tensor | None, limits: Limits, count: int
) -> Kept | None:
    """The sets, found among the `count` largest logits; None where a set may reach beyond them."""
    values_RC, ids_RC = _largest(logits_RV, count)
    most_R1, whole = values_RC[:, :1], count == logits_RV.shape[1]
    d_RC = _exponents(values_RC, most_R1, temperature_R)
    e_RC, place_C = d_RC.exp(), torch.arange(count, device=logits_RV.device)
    # A row with NaN or inf has it first, and no distribution.
    allowed_RC = (values_RC > -torch.inf) & (most_R1 < torch.inf)
    allowed_RC &= place_C < limits.top_k.unsqueeze(1)
    allowed_RC &= e_RC >= limits.min_p.unsqueeze(1)  # which 0 allows all
    # The mass up to each place, without the first one's, which is 1.
    mass_RC = e_RC.double().masked_fill_(~allowed_RC, 0)
    mass_RC[:, 0] = 0
    mass_RC = mass_RC.cumsum(1)
    total_R, size_R = 1 + mass_RC[:, -1], allowed_RC.sum(1).clamp_min(1)
    if not whole and bool((open_R := (size_R == count) & (limits.top_k > count)).any()):
        all_R = _mass(logits_RV, most_R1, temperature_R, limits.min_p)
        total_R = all_R.where(open_R, total_R)
    share_R1 = (limits.top_p * total_R).unsqueeze(1)
    reached_R = 1 + (1 + mass_RC[:, :-1] < share_R1).sum(1)
    size_R = size_R.minimum(reached_R).where(limits.top_p < 1, size_R)
    if not whole and bool(((size_R == count) & (limits.top_k > count)).any()):
        return None
    kept_RC = place_C < size_R.unsqueeze(1)
    s_R = mass_RC.gather(1, size_R.unsqueeze(1) - 1).squeeze(1)
    t_R = e_RC.mul_(d_RC).masked_fill_(~kept_RC, 0).sum(1, dtype=torch.float64)
    log_s_R = s_R.log1p()
    at_K = kept_RC.flatten().nonzero().squeeze(1)
    logprob_K = d_RC.flatten()[at_K] - log_s_R.repeat_interleave(size_R, output_size=len(at_K))
    entropy_R = log_s_R - t_R / (1 + s_R)
    return Kept(ids_RC.flatten()[at_K], logprob_K.float(), size_R, entropy_R.float())


def _largest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row and their ids, in order; of equal ones the first ids.

    Fewer than all are picked by keys of 64 bits, which a logit and its id make.
    """
    vocabulary = logits_RV.shape[1]
    if count == vocabulary:
        values_RC, ids_RC = logits_RV.sort(dim=1, descending=True, stable=True)
        return values_RC, ids_RC
    key_RV = sort_keys(logits_RV.float()).long() << 32
    key_RV -= torch.arange(vocabulary, device=logits_RV.device)
    ids_RC = -key_RV.topk(count, dim=1).values & 0xFFFFFFFF
    return logits_RV.gather(1, ids_RC), ids_RC


def _mass(
    logits_RV: Tensor, most_R1: Tensor, temperature_R: Tensor | None, min_p_R: Tensor
) -> Tensor:
    """The sum of exp((logits - most) / temperature) of each row, where that is at least min_p."""
    e_RV = _exponents(logits_RV, most_R1, temperature_R).exp_()
    return torch.where(e_RV >= min_p_R.unsqueeze(1), e_RV, 0).sum(1, dtype=torch.float64)


def _exponents(logits_RC: Tensor, most_R1: Tensor, temperature_R: Tensor | None) -> Tensor:
    d_RC = logits_RC.float() - most_R1.float()
    return d_RC if temperature_R is None else d_RC.div_(temperature_R.unsqueeze(1))


def _blocks(logits_RV: Tensor) -> list[slice]:
    """Rows whose logits are a block, at least one."""
    rows, vocabulary = logits_RV.shape
    block = _BLOCK["cuda" if logits_RV.is_cuda else "cpu"]
    return slices(rows, max(block // vocabulary, 1))


def _at(temperature_R: Tensor | None, rows: slice) -> Tensor | None:
    if temperature_R is None or temperature_R.numel() == 1:
        return temperature_R
    return temperature_R[rows]
