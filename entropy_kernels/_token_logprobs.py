"""The head's log-probabilities of given tokens in every row, beside those of the targets.

With U the distinct tokens, A_tu the gradient that arrives at log p_tu, summed over the copies of u
and, where u is the row's target, with that of its log-probability; S_t the sum of all that arrive;
g_t and H_t the entropy's gradient and value:

    dz_tu = A_tu (1 - p_tu) - p_tu (S_t - A_tu) - g_t p_tu (log p_tu + H_t)      u in U
    dz_tj = [j = target] G_t - p_tj S_t - g_t p_tj (log p_tj + H_t)              any other j

The backends' backward computes the second line, with a bias of -inf at U; the first is two small
products here. Both lines of a gradient are added in fp32, and rounded once.

T tokens, D hidden, V vocabulary, K tokens asked for, U distinct ones, R active rows.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, ops
from ._rows import ForwardRows, active_rows
from ._torch.blocks import compute_dtype, product
from .head import Head

# The least log p: exp of less is 0, and 0 times it is 0.
_LEAST_LOGPROB = -1e4


@torch.compiler.disable
def linear_token_logprobs(
    head: Head, ids: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [T], entropy [T] and the log-probabilities [T, K] of `ids`, all fp32.

    The head has hidden [T, D] and neither bias nor softcap; ids is int64 [K], each in [0, V),
    repeats allowed. Rows without a target are zero and get no gradient. Differentiable once, in
    hidden and weight: gradients of one token are summed in fp64, products in fp32, and results are
    rounded once.

    Holds a few [T, U] and, for backward, fp32 [T, D], beside what the head does. The caller has
    checked the head and the ids. Raises ValueError for an `impl` that cannot run there, and for the
    reference, which has no such function.
    """
    assert head.bias is None
    assert head.softcap is None
    if impl == "reference":
        raise ValueError('impl="reference" has no log-probs of selected_token_ids')
    head = head.flat()
    name = backends.resolve_head(impl, head)
    if name in ("triton", "cuda") and torch.is_grad_enabled():
        # Backward leaves the ids out by a bias, for which kernels are compiled.
        bias = head.weight.new_empty(head.weight.shape[0])
        name = backends.resolve_head(impl, replace(head, bias=bias))
    return _TokenLogprobs.apply(head.hidden, head.weight, head, ids, name)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, head: Head, ids_K: Tensor, impl: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob_T, entropy_T, _, max_T, log_sum_T, *_ = ops.linear_logprob_entropy(
            **ops.in_schema(head),
            keep_logits=False,
            max_active_rows=None,
            main_grad=None,
            impl=impl,
        )
        ids_U, place_K = ids_K.unique(return_inverse=True)
        z_TU = _product(hidden_TD, weight_VD[ids_U].T) - max_T.unsqueeze(1)
        if head.temperature is not None:
            z_TU /= head.temperature
        logp_TU = z_TU - log_sum_T.unsqueeze(1)
        # A token of more than half of the mass has the row's maximum as its logit, exactly.
        likely_TU = logp_TU > -math.log(2)
        logp_TU = torch.where(likely_TU, -log_sum_T.unsqueeze(1), logp_TU)
        logp_TU.masked_fill_(~head.valid.unsqueeze(1), 0.0)
        tensors, ctx.head_options = head.split()
        ctx.save_for_backward(ids_U, place_K, entropy_T, max_T, log_sum_T, logp_TU, *tensors)
        ctx.impl = impl
        ctx.set_materialize_grads(False)
        return logprob_T, entropy_T, logp_TU[:, place_K]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor | None, grad_entropy_T: Tensor | None, grad_TK: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ids_U, place_K, entropy_T, max_T, log_sum_T, logp_TU, *tensors = ctx.saved_tensors
        head = Head.joined(tensors, ctx.head_options)
        hidden_TD, weight_VD = head.hidden, head.weight
        dz_TU, others_T, rest_T = _gradients_of_tokens(
            (grad_T, grad_entropy_T, grad_TK), head, ids_U, place_K, entropy_T, logp_TU
        )
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        incoming = others_T, grad_entropy_T, rest_T
        # Other rows may hold what is not finite.
        own_R = (dz_TU != 0).any(1).nonzero().squeeze(1)
        dz_RU = dz_TU[own_R]
        sum_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=torch.float32) if need_hidden else None
        if sum_TD is not None:
            sum_TD[own_R] = _product(dz_RU, weight_VD[ids_U])

        def add(rows_RD: Tensor) -> None:
            assert sum_TD is not None
            index_R = active_rows(incoming, head.target, head.ignore_index)
            sum_TD.index_add_(0, index_R, rows_RD)

        bias_V = weight_VD.new_zeros(weight_VD.shape[0]).index_fill_(0, ids_U, -torch.inf)
        _, dweight_VD, _ = backends.backward(
            ctx.impl,
            incoming,
            replace(head, bias=bias_V),
            ForwardRows.for_backward(entropy_T, max_T, log_sum_T, log_sum_T[:0]),
            (need_hidden, need_weight, False),
            reduce_hidden=add,
        )
        if dweight_VD is not None:
            dweight_VD[ids_U] = _product(dz_RU.T, hidden_TD[own_R]).to(dweight_VD.dtype)
        dhidden_TD = None if sum_TD is None else sum_TD.to(hidden_TD.dtype)
        return dhidden_TD, dweight_VD, None, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fp32, with operands of 16 bits where both are."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != right.dtype:
            return product(left.float(), right.float())
        return product(compute_dtype(left), compute_dtype(right))


def _gradients_of_tokens(
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    head: Head,
    ids_U: Tensor,
    place_K: Tensor,
    entropy_T: Tensor,
    logp_TU: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz of the tokens U, fp32 [T, U]; and for all others what arrives at the log-probability of
    a target that is not in U, and at the log-sum-exp.
    """
    grad_T, grad_entropy_T, grad_TK = incoming
    valid_T = head.valid
    grad_T = torch.zeros_like(entropy_T) if grad_T is None else grad_T
    grad_T = grad_T.double().where(valid_T, 0.0)
    own_TU = logp_TU.new_zeros(logp_TU.shape, dtype=torch.float64)
    if grad_TK is not None:
        own_TU.index_add_(1, place_K, grad_TK.double().where(valid_T.unsqueeze(1), 0.0))
    is_target_TU = head.target.unsqueeze(1) == ids_U
    others_T = grad_T.masked_fill(is_target_TU.any(1), 0.0)
    total_T = own_TU.sum(1) + grad_T
    own_TU += is_target_TU * grad_T.unsqueeze(1)

    elsewhere_TU = (total_T.unsqueeze(1) - own_TU).float()
    logp_TU = logp_TU.clamp_min(_LEAST_LOGPROB)
    if grad_entropy_T is not None:
        elsewhere_TU += grad_entropy_T.unsqueeze(1) * (logp_TU + entropy_T.unsqueeze(1))
    dz_TU = -(own_TU.float() * logp_TU.expm1() + logp_TU.exp() * elsewhere_TU)
    if head.temperature is not None:
        dz_TU /= head.temperature
    arrives_T = (own_TU != 0).any(1) | (total_T != 0)
    if grad_entropy_T is not None:
        arrives_T |= grad_entropy_T != 0
    # What is NaN stays out of the gradients where none arrives.
    dz_TU = dz_TU.where((valid_T & arrives_T).unsqueeze(1), 0.0)
    return dz_TU, others_T.float(), (others_T - total_T).float()
