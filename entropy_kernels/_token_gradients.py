"""Gradients of the log-probabilities of chosen ids: what `_token_logprobs` runs backward.

Ids that all rows share are left out of the backend's backward, by a bias of -inf. Their dz is two
small products here.

Ids per token are other columns in each row. The backend's backward has one column per row whose dz
it computes from 1 - p: the target's. It is given the likeliest of the row's ids in its place. All
that arrives at another one, of a probability of 1/2 at most, is a pair of a row and an id here.

Both parts of a gradient are added in fp32, and rounded once.

T tokens, R active rows, D hidden, V vocabulary, K ids asked for, U places for distinct ones, J the
target and K ids, P pairs of a row and an id.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import _rows, backends
from ._pair_products import pair_sums
from ._rows import ForwardRows
from ._torch import blocks
from .backends import Gradients
from .head import Head

# The least log p: exp of less is 0, and 0 times it is 0.
_LEAST_LOGPROB = -1e4


class Run(NamedTuple):
    """How the head runs; `pairs` is the backend of products of pairs, where ids are per token."""

    impl: str
    keep_logits: bool
    store_above: Tensor | None
    store_rows: int
    max_active_rows: int | None
    main_grad: Tensor | None
    with_statistics: bool
    pairs: str = ""


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


def backward(
    given: Given,
    head: Head,
    rows: ForwardRows,
    chosen: Chosen,
    needs: tuple[bool, bool, bool],
    run: Run,
) -> Gradients:
    """Gradients of hidden, weight and bias; None for one not needed, or added to main_grad."""
    poison = _rows.beyond(given.active(head), run.max_active_rows)
    given = given.scaled(poison)
    if given.tokens is None:
        return backends.backward(
            run.impl,
            given[:3],
            head,
            rows,
            needs,
            max_active_rows=run.max_active_rows,
            main_grad=run.main_grad,
        )
    way = _of_pairs if chosen.place is None else _of_shared
    dhidden_TD, dweight_VD, dbias_V = way(given, head, rows, chosen, needs, run)
    if dhidden_TD is not None:
        dhidden_TD = (dhidden_TD if poison is None else dhidden_TD * poison).to(head.hidden.dtype)
    if dbias_V is not None and head.bias is not None:
        dbias_V = dbias_V.to(head.bias.dtype)
    return dhidden_TD, dweight_VD, dbias_V


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fp32, with operands of 16 bits where both are."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != right.dtype:
            return blocks.product(left.float(), right.float())
        return blocks.product(blocks.compute_dtype(left), blocks.compute_dtype(right))


def _of_shared(
    given: Given,
    head: Head,
    rows: ForwardRows,
    chosen: Chosen,
    needs: tuple[bool, bool, bool],
    run: Run,
) -> Gradients:
    ids_U, copy_U = chosen.ids, chosen.copy
    dz_TU, incoming = _dz_of_shared(given, head, rows, chosen)
    # Other rows may hold what is not finite.
    own_T = (dz_TU != 0).any(1)
    index_R, real_R = _rows.numbers(own_T, run.max_active_rows)
    dz_RU, hidden_RD = dz_TU[index_R], head.hidden[index_R]
    if real_R is not None:
        dz_RU = dz_RU.masked_fill(~real_R.unsqueeze(1), 0)
        hidden_RD = hidden_RD.masked_fill(~real_R.unsqueeze(1), 0)
    sum_TD = _Sum(head.hidden) if needs[0] else None
    if sum_TD is not None:
        sum_TD.add(product(dz_RU, head.weight[ids_U]), index_R)
    bias_V = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    _, dweight_VD, dbias_V = backends.backward(
        run.impl,
        incoming,
        replace(head, bias=bias_V.index_fill(0, ids_U, -torch.inf)),
        rows,
        needs,
        max_active_rows=run.max_active_rows,
        main_grad=run.main_grad,
        reduce_hidden=None if sum_TD is None else sum_TD.add,
    )
    # Backward has added nothing at the ids. Places left over write what the first does.
    out_VD = dweight_VD if run.main_grad is None else run.main_grad
    if needs[1] and out_VD is not None:
        more_UD = product(dz_RU.T, hidden_RD)[copy_U]
        out_VD[ids_U] = (out_VD[ids_U] + more_UD).to(out_VD.dtype)
    if dbias_V is not None:
        dbias_V[ids_U] = dz_RU.sum(0)[copy_U].to(dbias_V.dtype)
    return None if sum_TD is None else sum_TD.value, dweight_VD, dbias_V


class _Sum:
    """The hidden states' gradient, fp32 [T, D], as its parts come."""

    def __init__(self, hidden_TD: Tensor) -> None:
        self.value = hidden_TD.new_zeros(hidden_TD.shape, dtype=torch.float32)

    def add(self, rows_RD: Tensor, index_R: Tensor) -> None:
        self.value.index_add_(0, index_R, rows_RD)


def _dz_of_shared(
    given: Given, head: Head, rows: ForwardRows, chosen: Chosen
) -> tuple[Tensor, Gradients]:
    """dz of the tokens U, fp32 [T, U]; and what arrives at the log-prob of a target that is not in
    U, at the entropy, and at the log-sum-exp.
    """
    assert given.tokens is not None
    assert chosen.place is not None
    assert chosen.copy is not None
    valid_T, ids_U, logp_TU = head.valid, chosen.ids, chosen.logp
    grad_T = _double(given.logprob, valid_T)
    own_TU = torch.zeros_like(logp_TU, dtype=torch.float64)
    own_TU.index_add_(1, chosen.place, given.tokens.double().where(valid_T.unsqueeze(1), 0.0))
    total_T = own_TU.sum(1) + grad_T - _double(given.logsumexp, valid_T)
    is_target_TU = head.target.unsqueeze(1) == ids_U
    own_TU += is_target_TU * grad_T.unsqueeze(1)
    others_T = grad_T.masked_fill(is_target_TU.any(1), 0.0)

    elsewhere_TU = (total_T.unsqueeze(1) - own_TU).float()
    arrives_T = (own_TU != 0).any(1) | (total_T != 0)
    logp_TU = logp_TU.clamp_min(_LEAST_LOGPROB)
    if given.entropy is not None:
        slope_TU = logp_TU + rows.entropy.unsqueeze(1)
        elsewhere_TU += given.entropy.float().unsqueeze(1) * slope_TU
        arrives_T |= given.entropy != 0
    dz_TU = -(own_TU.float() * logp_TU.expm1() + logp_TU.exp() * elsewhere_TU)
    dz_TU = _through_logits(dz_TU, chosen.slope, head)
    # What is NaN stays out of the gradients where none arrives.
    first_U = chosen.copy == torch.arange(len(ids_U), device=ids_U.device)
    here_TU = (valid_T & arrives_T).unsqueeze(1) & first_U
    incoming = others_T.float(), given.entropy, (others_T - total_T).float()
    return dz_TU.where(here_TU, 0.0), incoming


def _double(grad_T: Tensor | None, valid_T: Tensor) -> Tensor:
    """A gradient of rows, fp64 [T]: 0 where there is none."""
    if grad_T is None:
        return torch.zeros_like(valid_T, dtype=torch.float64)
    return grad_T.double().where(valid_T, 0.0)


def _through_logits(dz_TN: Tensor, slope_TN: Tensor | None, head: Head) -> Tensor:
    """The gradient of h . w + b, from that of the logit over its temperature."""
    if head.temperature_T is not None:
        dz_TN = dz_TN / head.temperature_T.unsqueeze(1)
    return dz_TN if slope_TN is None else dz_TN * slope_TN


def _of_pairs(
    given: Given,
    head: Head,
    rows: ForwardRows,
    chosen: Chosen,
    needs: tuple[bool, bool, bool],
    run: Run,
) -> Gradients:
    dz_TJ, ids_TJ, slot_T, incoming = _dz_of_pairs(given, head, rows, chosen)
    weight, bias = head.weight, head.bias
    sum_TD = _Sum(head.hidden) if needs[0] else None
    # A sum of both parts in fp32, where weight or main_grad has 16 bits.
    main_grad, buffer = run.main_grad, None
    if needs[1] and (weight if main_grad is None else main_grad).dtype != torch.float32:
        main_grad = buffer = weight.new_zeros(weight.shape, dtype=torch.float32)
    if needs[2] and bias is not None:
        bias = bias.float()
    _, dweight_VD, dbias_V = backends.backward(
        # The kernels of csrc/cuda take a bias of 16 bits.
        "triton" if run.impl == "cuda" and needs[2] else run.impl,
        incoming,
        replace(head, target=slot_T, bias=bias),
        rows,
        needs,
        max_active_rows=run.max_active_rows,
        main_grad=main_grad,
        reduce_hidden=None if sum_TD is None else sum_TD.add,
    )
    pairs = _Pairs.of(dz_TJ, ids_TJ, run.pairs)
    if sum_TD is not None:
        pair_sums(run.pairs, pairs.dz, weight, pairs.id, pairs.row, sum_TD.value, add=True)
    if needs[1] or needs[2]:
        pairs = pairs.by_id()
    if needs[1]:
        out_VD = dweight_VD if main_grad is None else main_grad
        assert out_VD is not None
        pair_sums(run.pairs, pairs.dz, head.hidden, pairs.row, pairs.id, out_VD, add=True)
    if buffer is not None and run.main_grad is not None:
        run.main_grad.add_(buffer)
    elif buffer is not None:
        dweight_VD = buffer.to(weight.dtype)
    if dbias_V is not None:
        ones_T1 = torch.ones(len(slot_T), 1, device=slot_T.device)
        out_V1 = dbias_V.unsqueeze(1)
        pair_sums(run.pairs, pairs.dz, ones_T1, pairs.row, pairs.id, out_V1, add=True)
    return None if sum_TD is None else sum_TD.value, dweight_VD, dbias_V


class _Pairs(NamedTuple):
    """Rows and ids with a gradient of their own, fp32; by row, or `by_id`."""

    dz: Tensor
    row: Tensor
    id: Tensor

    @staticmethod
    def of(dz_TJ: Tensor, ids_TJ: Tensor, impl: str) -> "_Pairs":
        """All of them; those of 0 are left out by the kernels, or here where they do not."""
        row_TJ = torch.arange(len(ids_TJ), device=ids_TJ.device).unsqueeze(1).expand_as(ids_TJ)
        pairs = _Pairs(dz_TJ.flatten(), row_TJ.flatten(), ids_TJ.flatten())
        if impl in ("triton", "cuda"):
            return pairs
        at = (pairs.dz != 0).nonzero().squeeze(1)
        return _Pairs(*(x[at] for x in pairs))

    def by_id(self) -> "_Pairs":
        order = self.id.argsort(stable=True)
        return _Pairs(*(x[order] for x in self))


def _dz_of_pairs(
    given: Given, head: Head, rows: ForwardRows, chosen: Chosen
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """dz of pairs, fp32 [T, J], 0 at what the backend computes; their ids; the id that stands for
    each row's target; and what arrives at its log-prob, at the entropy and at the log-sum-exp.
    """
    assert given.tokens is not None
    valid_T = head.valid
    arrives_TJ = torch.cat(
        [
            _double(given.logprob, valid_T).unsqueeze(1),
            given.tokens.double().where(valid_T.unsqueeze(1), 0.0),
        ],
        1,
    )
    ids_TJ = torch.cat([head.target.unsqueeze(1), chosen.ids], 1)
    grad_logsumexp_T = _double(given.logsumexp, valid_T)
    total_T = arrives_TJ.sum(1) - grad_logsumexp_T
    # Where nothing arrives at the log-sum-exp each id has its own gradient alone.
    beyond_T = total_T != 0
    if given.entropy is not None:
        beyond_T |= given.entropy != 0
    # The likeliest of those that a gradient arrives at; the target where there is none.
    logp_TJ = torch.cat([rows.logprob.unsqueeze(1), chosen.logp], 1)
    logp_TJ = logp_TJ.clamp_min(_LEAST_LOGPROB).where(arrives_TJ != 0, 3 * _LEAST_LOGPROB)
    logp_TJ[:, 0].clamp_min_(2 * _LEAST_LOGPROB)
    slot_T1 = ids_TJ.gather(1, logp_TJ.argmax(1, keepdim=True))
    its_TJ = (ids_TJ == slot_T1) & beyond_T.unsqueeze(1)
    own_T = arrives_TJ.where(its_TJ, 0.0).sum(1)
    rest_T = (own_T - total_T).where(beyond_T, 0.0)
    slope_TJ = None
    if chosen.slope is not None:
        slope_TJ = torch.cat([_slope_of_target(head, rows), chosen.slope.double()], 1)
    alone_TJ = arrives_TJ.masked_fill(its_TJ, 0.0)
    dz_TJ = _through_logits(alone_TJ, slope_TJ, head).where(alone_TJ != 0, 0.0)
    incoming = own_T.float(), given.entropy, rest_T.float()
    slot_T = slot_T1.squeeze(1).where(valid_T, head.target)
    return dz_TJ.float(), ids_TJ.clamp(0, len(head.weight) - 1), slot_T, incoming


def _slope_of_target(head: Head, rows: ForwardRows) -> Tensor:
    """The slope of the softcap at each target's logit, fp64 [T, 1]."""
    assert head.softcap is not None
    z_T = rows.logprob.double() + rows.log_sum
    if head.temperature_T is not None:
        z_T = z_T * head.temperature_T
    return (1 - ((z_T + rows.max) / head.softcap).square()).clamp_min(0).unsqueeze(1)
