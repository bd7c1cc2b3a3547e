"""Log-probs of ids per token, and their gradients: products of pairs of a token and an id.

Ids per token are other columns in each row. The backend's backward has one column per row whose dz
it computes from 1 - p: the target's. It is given the likeliest of the row's ids in its place. All
that arrives at another one, of a probability of 1/2 at most, is a pair of a row and an id here.

Both parts of a gradient are added in fp32, and rounded once.

T tokens, D hidden, V vocabulary, K ids asked for, J the target and K ids, P pairs.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from ._pair_products import pair_dots, pair_sums
from ._rows import ForwardRows
from ._token_ids import LEAST_LOGPROB, Chosen, Given, Run, Sum, double, logprobs, through_logits
from .backends import Gradients
from .head import Head


def forward(ids_TK: Tensor, head: Head, rows: ForwardRows, run: Run) -> Chosen:
    """Ids per token are products of pairs, of each token with a target and its ids."""
    tokens, count = ids_TK.shape
    row_P = torch.arange(tokens, device=ids_TK.device).repeat_interleave(count)
    keep_P = head.valid.repeat_interleave(count)
    x_P = pair_dots(run.pairs, head.hidden, head.weight, row_P, ids_TK.reshape(-1), keep_P)
    logp_TK, slope_TK = logprobs(x_P.view(tokens, count), ids_TK, head, rows)
    return Chosen(ids_TK, logp_TK, slope_TK, None, None)


def backward(
    given: Given,
    head: Head,
    rows: ForwardRows,
    chosen: Chosen,
    needs: tuple[bool, bool, bool],
    run: Run,
) -> Gradients:
    dz_TJ, ids_TJ, slot_T, incoming = _dz_of_pairs(given, head, rows, chosen)
    weight, bias = head.weight, head.bias
    sum_TD = Sum(head.hidden) if needs[0] else None
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
            double(given.logprob, valid_T).unsqueeze(1),
            given.tokens.double().where(valid_T.unsqueeze(1), 0.0),
        ],
        1,
    )
    ids_TJ = torch.cat([head.target.unsqueeze(1), chosen.ids], 1)
    grad_logsumexp_T = double(given.logsumexp, valid_T)
    total_T = arrives_TJ.sum(1) - grad_logsumexp_T
    # Where nothing arrives at the log-sum-exp each id has its own gradient alone.
    beyond_T = total_T != 0
    if given.entropy is not None:
        beyond_T |= given.entropy != 0
    # The likeliest of those that a gradient arrives at; the target where there is none.
    logp_TJ = torch.cat([rows.logprob.unsqueeze(1), chosen.logp], 1)
    logp_TJ = logp_TJ.clamp_min(LEAST_LOGPROB).where(arrives_TJ != 0, 3 * LEAST_LOGPROB)
    logp_TJ[:, 0].clamp_min_(2 * LEAST_LOGPROB)
    slot_T1 = ids_TJ.gather(1, logp_TJ.argmax(1, keepdim=True))
    its_TJ = (ids_TJ == slot_T1) & beyond_T.unsqueeze(1)
    own_T = arrives_TJ.where(its_TJ, 0.0).sum(1)
    rest_T = (own_T - total_T).where(beyond_T, 0.0)
    slope_TJ = None
    if chosen.slope is not None:
        slope_TJ = torch.cat([_slope_of_target(head, rows), chosen.slope.double()], 1)
    alone_TJ = arrives_TJ.masked_fill(its_TJ, 0.0)
    dz_TJ = through_logits(alone_TJ, slope_TJ, head).where(alone_TJ != 0, 0.0)
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
