"""Log-probabilities of chosen token ids in every row, beside what the head gives of the targets.

With A_ti the gradient that arrives at log p of the id i, summed over its copies and, where i is the
row's target, with that of its log-prob; S_t the sum of all that arrives, less the gradient of the
log-sum-exp; g_t and H_t the entropy's gradient and value:

    dz_ti = A_ti (1 - p_ti) - p_ti (S_t - A_ti) - g_t p_ti (log p_ti + H_t)      a chosen id
    dz_tj =                 - p_tj S_t          - g_t p_tj (log p_tj + H_t)      any other j

over the temperature, times the softcap's slope. There are two ways to compute it: `_token_shared`
for ids that all rows share, and `_token_pairs` for ids per token.

T tokens, D hidden, V vocabulary, K ids asked for, U places for distinct ones.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _rows, _token_pairs, _token_shared, backends, ops
from ._rows import ForwardRows
from ._token_ids import Chosen, Given, Run, check_values
from .backends import Gradients
from .head import Head


@torch.compiler.disable
def linear_logprob_entropy(head: Head, token_ids: Tensor, asked: str, run: Run) -> Any:
    """logprob, entropy, logsumexp, fp32 [T], statistics as the op's, and log-probs, fp32 [T, K].

    The head and the ids are flat and checked. `asked` is the caller's impl, of which `run.impl` is
    what runs the head.
    """
    if _rows.sees_values(head.hidden.device):
        check_values(token_ids, head)
    if token_ids.ndim == 1 and run.stores:
        # Stored logits are those of all ids: backward cannot leave some out.
        token_ids = token_ids.expand(len(head.target), -1)
    if token_ids.ndim > 1:
        pairs = backends.resolve("support", asked, head.hidden.device, head.hidden.dtype)
        run = run._replace(pairs=pairs)
    elif run.impl in ("triton", "cuda") and torch.is_grad_enabled():
        # Backward leaves the ids out by a bias, for which kernels are compiled.
        bias = head.weight.new_empty(head.weight.shape[0])
        name = backends.resolve_head(asked, replace(head, bias=bias))
        run = run._replace(options=run.options | {"impl": name})
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
            # These two are backward's, which is not the op's here.
            **run.options | {"max_active_rows": None, "main_grad": None},
        )
        rows = ForwardRows(*of_head)
        outside = (token_ids < 0) | (token_ids >= weight_VD.shape[0])
        ids = token_ids.clamp(0, weight_VD.shape[0] - 1)
        way = _token_shared if ids.ndim == 1 else _token_pairs
        chosen = way.forward(ids, head, rows, run)
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
        sizes = len(Chosen._fields), len(ForwardRows._fields)
        chosen = Chosen(*rest[: sizes[0]])
        rows = ForwardRows(*rest[sizes[0] : sum(sizes)])._replace(places=None)
        head = Head.joined(rest[sum(sizes) :], ctx.head_options)
        given = Given(grad_T, grad_entropy_T, grad_logsumexp_T, grad_TK)
        # What arrives at a NaN is NaN in its row.
        given = given.with_nan_at(rows.logprob, found_TK)
        gradients = _backward(given, head, rows, chosen, ctx.needs_input_grad[:3], ctx.run)
        return *gradients, None, None, None


def _backward(
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
    way = _token_pairs if chosen.place is None else _token_shared
    dhidden_TD, dweight_VD, dbias_V = way.backward(given, head, rows, chosen, needs, run)
    if dhidden_TD is not None:
        dhidden_TD = (dhidden_TD if poison is None else dhidden_TD * poison).to(head.hidden.dtype)
    if dbias_V is not None and head.bias is not None:
        dbias_V = dbias_V.to(head.bias.dtype)
    return dhidden_TD, dweight_VD, dbias_V
