"""Log-probabilities of chosen token ids in every row, beside what the head gives of the targets.

With A_ti the gradient that arrives at log p of the id i, summed over its copies and, where i is the
row's target, with that of its log-prob; S_t the sum of all that arrives, less the gradient of the
log-sum-exp; g_t and H_t the entropy's gradient and value:

    dz_ti = A_ti (1 - p_ti) - p_ti (S_t - A_ti) - g_t p_ti (log p_ti + H_t)      a chosen id
    dz_tj =                 - p_tj S_t          - g_t p_tj (log p_tj + H_t)      any other j

over the temperature, times the softcap's slope. `_token_gradients` has two ways to compute it: of
ids that all rows share, and of ids per token.

T tokens, D hidden, V vocabulary, K ids asked for, U places for distinct ones.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _rows, _token_gradients, backends, ops
from ._pair_products import pair_dots
from ._token_gradients import Chosen, Run, product
from ._token_ids import check_values
from .head import Head


@torch.compiler.disable
def linear_logprob_entropy(head: Head, token_ids: Tensor, asked: str, run: Run) -> Any:
    """logprob, entropy, logsumexp, fp32 [T], statistics as the op's, and log-probs, fp32 [T, K].

    The head and the ids are flat and checked. `asked` is the caller's impl, of which `run.impl` is
    what runs the head.
    """
    if _rows.sees_values(head.hidden.device):
        check_values(token_ids, head)
    if token_ids.ndim == 1 and (run.keep_logits or run.store_above is not None):
        # Stored logits are those of all ids: backward cannot leave some out.
        token_ids = token_ids.expand(len(head.target), -1)
    if token_ids.ndim > 1:
        pairs = backends.resolve("support", asked, head.hidden.device, head.hidden.dtype)
        run = run._replace(pairs=pairs)
    elif run.impl in ("triton", "cuda") and torch.is_grad_enabled():
        # Backward leaves the ids out by a bias, for which kernels are compiled.
        bias = head.weight.new_empty(head.weight.shape[0])
        run = run._replace(impl=backends.resolve_head(asked, replace(head, bias=bias)))
    matrices = [x if x.stride(1) == 1 else x.contiguous() for x in (head.hidden, head.weight)]
    head = replace(head, hidden=matrices[0], weight=matrices[1])
    return _TokenLogprobs.apply(*matrices, head.bias, head, token_ids, run)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        token_ids: Tensor,
        run: Run,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *of_head, statistics = ops.linear_logprob_entropy(
            **ops.in_schema(head),
            keep_logits=run.keep_logits,
            max_active_rows=None,
            main_grad=None,
            impl=run.impl,
            store_above=run.store_above,
            store_rows=run.store_rows,
            with_statistics=run.with_statistics,
        )
        rows = _rows.ForwardRows(*of_head)
        outside = (token_ids < 0) | (token_ids >= weight_VD.shape[0])
        ids = token_ids.clamp(0, weight_VD.shape[0] - 1)
        chosen = _shared(ids, head, rows) if ids.ndim == 1 else _per_token(ids, head, rows, run)
        found_TK = chosen.logp if chosen.place is None else chosen.logp[:, chosen.place]
        if not _rows.sees_values(hidden_TD.device):
            found_TK = found_TK.masked_fill(outside & head.valid.unsqueeze(1), torch.nan)
        tensors, ctx.head_options = head.split()
        ctx.save_for_backward(found_TK, *chosen, *rows, *tensors)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        return rows.logprob, rows.entropy, rows.logsumexp, statistics, found_TK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_T: Tensor | None,
        grad_entropy_T: Tensor | None,
        grad_logsumexp_T: Tensor | None,
        _: Any,
        grad_TK: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        found_TK, *rest = ctx.saved_tensors
        sizes = len(Chosen._fields), len(_rows.ForwardRows._fields)
        chosen = Chosen(*rest[: sizes[0]])
        rows = _rows.ForwardRows(*rest[sizes[0] : sum(sizes)])
        head = Head.joined(rest[sum(sizes) :], ctx.head_options)
        if not ctx.run.store_rows:
            rows = rows._replace(places=None)
        given = _token_gradients.Given(grad_T, grad_entropy_T, grad_logsumexp_T, grad_TK)
        # What arrives at a NaN is NaN in its row.
        given = given.with_nan_at(rows.logprob, found_TK)
        gradients = _token_gradients.backward(
            given, head, rows, chosen, ctx.needs_input_grad[:3], ctx.run
        )
        return *gradients, None, None, None


def _shared(ids_K: Tensor, head: Head, rows: _rows.ForwardRows) -> Chosen:
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
    x_TU = product(head.hidden, head.weight[ids_U].T)
    logp_TU, slope_TU = _logprobs(x_TU, ids_U.unsqueeze(0), head, rows)
    place_K = torch.empty_like(at_K).scatter_(0, order_K, at_K)
    return Chosen(ids_U, logp_TU, slope_TU, place_K, copy_U)


def _per_token(ids_TK: Tensor, head: Head, rows: _rows.ForwardRows, run: Run) -> Chosen:
    """Ids per token are products of pairs, of each token with a target and its ids."""
    tokens, count = ids_TK.shape
    row_P = torch.arange(tokens, device=ids_TK.device).repeat_interleave(count)
    keep_P = head.valid.repeat_interleave(count)
    x_P = pair_dots(run.pairs, head.hidden, head.weight, row_P, ids_TK.reshape(-1), keep_P)
    logp_TK, slope_TK = _logprobs(x_P.view(tokens, count), ids_TK, head, rows)
    return Chosen(ids_TK, logp_TK, slope_TK, None, None)


def _logprobs(
    x_TN: Tensor, ids_TN: Tensor, head: Head, rows: _rows.ForwardRows
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
