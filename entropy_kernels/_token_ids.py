"""What both ways to log-probs of chosen ids share: checks of the ids, values, and the formula.

T tokens, D hidden, V vocabulary, K ids asked for, U places for distinct ones.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _rows
from ._arguments import check_tensor
from ._rows import ForwardRows
from .head import Head

# The least log p: exp of less is 0, and 0 times it is 0.
LEAST_LOGPROB = -1e4


def flat(token_ids: Tensor, head: Head) -> Tensor:
    """The ids of a head that was checked, int64: [K] of all rows, or [T, K].

    Raises:
        ValueError: another type, shape or device; names what came and what was wanted.
    """
    check_tensor("token_ids", token_ids)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids must be int64 or int32; got {token_ids.dtype}")
    if token_ids.device != head.hidden.device:
        raise ValueError(
            f"token_ids must be on {head.hidden.device}, like hidden; got {token_ids.device}"
        )
    shape, tokens = tuple(token_ids.shape), tuple(head.target.shape)
    if len(shape) != 1 and (len(shape) == 0 or shape[:-1] != tokens):
        wanted = ", ".join([*map(str, tokens), "K"])
        raise ValueError(f"token_ids must be [K], or [{wanted}] like target; got {shape}")
    flat_ids = token_ids if len(shape) == 1 else token_ids.flatten(0, -2)
    return flat_ids.long()


def check_values(ids: Tensor, head: Head) -> None:
    """Every flat id lies in [0, V); per token those of rows with a target.

    Raises:
        ValueError: names the id, its token and what was wanted.
    """
    vocabulary = head.weight.shape[0]
    wrong = (ids < 0) | (ids >= vocabulary)
    if ids.ndim > 1:
        wrong &= head.valid.unsqueeze(1)
    if wrong.any():
        where = f" at token {int(wrong.nonzero()[0, 0])}" if ids.ndim > 1 else ""
        raise ValueError(
            f"token_ids must lie in [0, {vocabulary}); got {int(ids[wrong][0])}{where}"
        )


class Run(NamedTuple):
    """How the head runs: `options` are those of its op beside the head, `impl` among them.

    pairs: the backend of products of pairs, where ids are per token.
    """

    options: dict[str, Any]
    pairs: str = ""

    @property
    def impl(self) -> str:
        return self.options["impl"]

    @property
    def max_active_rows(self) -> int | None:
        return self.options["max_active_rows"]

    @property
    def main_grad(self) -> Tensor | None:
        return self.options["main_grad"]

    @property
    def stores(self) -> bool:
        """Whether forward stores the logits of all rows; it never stores those of some."""
        return self.options["keep_logits"]


class Chosen(NamedTuple):
    """The ids and what forward finds of them.

    ids: [U] of all rows, or [T, K]; logp and the softcap's slope, None without one: [T, U] or
    [T, K]. place: of K ids that rows share, each one's place among U. copy: [U], the place itself,
    and 0 of a place left over, which repeats the first.
    """

    ids: Tensor
    logp: Tensor
    slope: Tensor | None
    place: Tensor | None
    copy: Tensor | None


class Given(NamedTuple):
    """The gradients that arrive: of logprob, entropy and logsumexp, [T], and of the ids, [T, K]."""

    logprob: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor | None
    tokens: Tensor | None

    def with_nan_at(self, logprob_T: Tensor, found_TK: Tensor) -> "Given":
        """NaN where a gradient arrives at a NaN of the targets or of the ids."""

        def lost(x: Tensor | None, found: Tensor) -> Tensor | None:
            return x if x is None else x.masked_fill(found.isnan() & (x != 0), torch.nan)

        tokens, logprob = lost(self.tokens, found_TK), lost(self.logprob, logprob_T)
        return self._replace(tokens=tokens, logprob=logprob)

    def active(self, head: Head) -> Tensor:
        """The rows at which any arrives, bool [T]."""
        any_T = None if self.tokens is None else (self.tokens != 0).any(1)
        return _rows.is_active((*self[:3], any_T), head.target, head.ignore_index)

    def scaled(self, factor: Tensor | None) -> "Given":
        if factor is None:
            return self
        return Given(*(None if x is None else x * factor for x in self))


def logprobs(
    x_TN: Tensor, ids_TN: Tensor, head: Head, rows: ForwardRows
) -> tuple[Tensor, Tensor | None]:
    """log p from products h . w, which it overwrites, and the softcap's slope, if there is one."""
    if head.bias is not None:
        x_TN += head.bias[ids_TN]
    slope_TN = None
    if head.softcap is not None:
        x_TN = x_TN.div_(head.softcap).tanh_()
        slope_TN = 1 - x_TN.square()
        x_TN *= head.softcap
    x_TN -= rows.max.unsqueeze(1)
    if head.temperature_T is not None:
        x_TN /= head.temperature_T.unsqueeze(1)
    log_sum_T1 = rows.log_sum.unsqueeze(1)
    x_TN -= log_sum_T1
    # A token of more than half of the mass has the row's maximum as its logit, exactly.
    x_TN = torch.where(x_TN > -math.log(2), -log_sum_T1, x_TN)
    is_target_TN = ids_TN == head.target.unsqueeze(1)
    x_TN = torch.where(is_target_TN, rows.logprob.unsqueeze(1), x_TN)
    x_TN.masked_fill_(rows.entropy.isnan().unsqueeze(1), torch.nan)
    return x_TN.masked_fill_(~head.valid.unsqueeze(1), 0.0), slope_TN


class Sum:
    """The hidden states' gradient, fp32 [T, D], as its parts come."""

    def __init__(self, hidden_TD: Tensor) -> None:
        self.value = hidden_TD.new_zeros(hidden_TD.shape, dtype=torch.float32)

    def add(self, rows_RD: Tensor, index_R: Tensor) -> None:
        self.value.index_add_(0, index_R, rows_RD)


def double(grad_T: Tensor | None, valid_T: Tensor) -> Tensor:
    """A gradient of rows, fp64 [T]: 0 where there is none."""
    if grad_T is None:
        return torch.zeros_like(valid_T, dtype=torch.float64)
    return grad_T.double().where(valid_T, 0.0)


def through_logits(dz_TN: Tensor, slope_TN: Tensor | None, head: Head) -> Tensor:
    """The gradient of h . w + b, from that of the logit over its temperature."""
    if head.temperature_T is not None:
        dz_TN = dz_TN / head.temperature_T.unsqueeze(1)
    return dz_TN if slope_TN is None else dz_TN * slope_TN
