"""Log-probs of ids that all rows share, and their gradients: two small products beside the head's.

The backend's backward leaves the ids out, by a bias of -inf. Both parts of a gradient are added in
fp32, and rounded once.

T tokens, R active rows, D hidden, V vocabulary, K ids asked for, U places for distinct ones.
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import _rows, backends
from ._rows import ForwardRows
from ._token_ids import LEAST_LOGPROB, Chosen, Given, Run, Sum, double, logprobs, through_logits
from ._torch import blocks
from .backends import Gradients
from .head import Head


def forward(ids_K: Tensor, head: Head, rows: ForwardRows, _: Run) -> Chosen:
    """Ids that all rows share are products with the weight's rows of the distinct ones."""
    sorted_K, order_K = ids_K.sort(stable=True)
    new_K = torch.ones_like(sorted_K, dtype=torch.bool)
    new_K[1:] = sorted_K[1:] != sorted_K[:-1]
    at_K = new_K.cumsum(0) - 1
    # Nobody waits for the number of distinct ones: the places left over repeat the first.
    ids_U = torch.zeros_like(sorted_K).scatter_(0, at_K, sorted_K)
    number_U = torch.arange(len(ids_U), device=ids_U.device)
    copy_U = number_U.where(number_U <= at_K[-1:], 0)
    ids_U = ids_U[copy_U]
    x_TU = _product(head.hidden, head.weight[ids_U].T)
    logp_TU, slope_TU = logprobs(x_TU, ids_U.unsqueeze(0), head, rows)
    place_K = torch.empty_like(at_K).scatter_(0, order_K, at_K)
    return Chosen(ids_U, logp_TU, slope_TU, place_K, copy_U)


def backward(
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
    sum_TD = Sum(head.hidden) if needs[0] else None
    if sum_TD is not None:
        sum_TD.add(_product(dz_RU, head.weight[ids_U]), index_R)
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
        more_UD = _product(dz_RU.T, hidden_RD)[copy_U]
        out_VD[ids_U] = (out_VD[ids_U] + more_UD).to(out_VD.dtype)
    if dbias_V is not None:
        dbias_V[ids_U] = dz_RU.sum(0)[copy_U].to(dbias_V.dtype)
    return None if sum_TD is None else sum_TD.value, dweight_VD, dbias_V


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
    grad_T = double(given.logprob, valid_T)
    own_TU = torch.zeros_like(logp_TU, dtype=torch.float64)
    own_TU.index_add_(1, chosen.place, given.tokens.double().where(valid_T.unsqueeze(1), 0.0))
    total_T = own_TU.sum(1) + grad_T - double(given.logsumexp, valid_T)
    is_target_TU = head.target.unsqueeze(1) == ids_U
    own_TU += is_target_TU * grad_T.unsqueeze(1)
    others_T = grad_T.masked_fill(is_target_TU.any(1), 0.0)

    elsewhere_TU = (total_T.unsqueeze(1) - own_TU).float()
    arrives_T = (own_TU != 0).any(1) | (total_T != 0)
    logp_TU = logp_TU.clamp_min(LEAST_LOGPROB)
    if given.entropy is not None:
        slope_TU = logp_TU + rows.entropy.unsqueeze(1)
        elsewhere_TU += given.entropy.float().unsqueeze(1) * slope_TU
        arrives_T |= given.entropy != 0
    dz_TU = -(own_TU.float() * logp_TU.expm1() + logp_TU.exp() * elsewhere_TU)
    dz_TU = through_logits(dz_TU, chosen.slope, head)
    # What is NaN stays out of the gradients where none arrives.
    first_U = chosen.copy == torch.arange(len(ids_U), device=ids_U.device)
    here_TU = (valid_T & arrives_T).unsqueeze(1) & first_U
    incoming = others_T.float(), given.entropy, (others_T - total_T).float()
    return dz_TU.where(here_TU, 0.0), incoming


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fp32, with operands of 16 bits where both are."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != right.dtype:
            return blocks.product(left.float(), right.float())
        return blocks.product(blocks.compute_dtype(left), blocks.compute_dtype(right))
