"""The head's backward: gradients from the rows whose incoming gradient is not zero.

    dz_j = [g_logprob (1[j = target] - p_j) + g_logsumexp p_j - g_entropy p_j (log p_j + H)] / temp

The logits of those rows are recomputed one vocabulary block at a time; each row of the weight's
gradient is written, or added to, once, the hidden states' gradient is summed over blocks in fp32.

T tokens, R active rows, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import ForwardRows, is_active, numbers, spread
from ..head import Head
from .blocks import (
    EXPONENT_OF_ZERO,
    LOWEST_EXPONENT,
    at,
    compute_dtype,
    few_passes,
    logits,
    product,
    sizes,
    slices,
    target_column,
    view,
    workspace,
)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Active(NamedTuple):
    """The active rows: their numbers, the gradients that arrive, and forward's results, all [R].

    With a bound for them some may be none; `real` says which are rows.
    """

    number: Tensor
    real: Tensor | None
    grad_logprob: Tensor | None
    grad_entropy: Tensor | None
    grad_logsumexp: Tensor | None
    target: Tensor
    temperature: Tensor | None
    entropy: Tensor
    max: Tensor
    log_sum: Tensor

    def chunk(self, rows: slice) -> "_Active":
        return _Active(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class _Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def backward(
    gradients: Gradients,
    head: Head,
    rows: ForwardRows,
    needs: tuple[bool, bool, bool],
    *,
    main_grad: Tensor | None = None,
    reduce_hidden: Callable[[Tensor, Tensor], None] | None = None,
    max_active_rows: int | None = None,
) -> Gradients:
    """Gradients of hidden, weight and bias, from those of logprob, entropy and log-sum-exp.

    A gradient that `needs` does not ask for is None, and so is the weight's where it is added to
    `main_grad`, [V, D] of any dtype. On CUDA the host waits for the number of active rows, unless
    `max_active_rows` bounds it. More of them then make every gradient NaN.

    `reduce_hidden` takes the hidden states' gradient of the active rows, fp32 [R, D], and their
    numbers, [R], before it is rounded. It may change it in place, to add what other ranks have.
    """
    active_T = is_active(gradients, head.target, head.ignore_index)
    hidden_RD, active, poison = _gather(active_T, max_active_rows, gradients, head, rows)
    logits_TV = rows.logits if rows.logits.numel() else None
    dhidden_RD, dweight_VD, dbias_V = _gradients(
        hidden_RD, active, head, logits_TV, _Needs(*needs), main_grad
    )
    if dhidden_RD is None:
        return None, dweight_VD, dbias_V
    if reduce_hidden is not None:
        reduce_hidden(dhidden_RD, active.number)
    if poison is None:
        return spread(dhidden_RD, active.number, head.hidden), dweight_VD, dbias_V
    dhidden_TD = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format)
    dhidden_TD.index_add_(0, active.number, dhidden_RD.to(dhidden_TD.dtype)).mul_(poison)
    return dhidden_TD, dweight_VD, dbias_V


def _gather(
    active_T: Tensor, most: int | None, gradients: Gradients, head: Head, rows: ForwardRows
) -> tuple[Tensor, _Active, Tensor | None]:
    """The hidden states and all else of the active rows.

    With a bound they are filled up to it by row 0, with numbers that make its gradient zero
    whatever that row holds. Then also a factor of every gradient, 0-dim: NaN beyond the bound.
    """
    # At least one, so that what is beyond a bound of 0 has a row to be seen at.
    index_R, real_R = numbers(active_T, most)
    poison = None if most is None else torch.where(active_T.sum() <= most, 1.0, torch.nan)

    def pick(x_T: Tensor | None, other: float = 0) -> Any:
        x_R = at(x_T, index_R)
        return x_R if x_R is None or real_R is None else x_R.where(real_R, other)

    def arriving(grad_T: Tensor | None) -> Tensor | None:
        grad_R = None if grad_T is None else pick(grad_T).float()
        return grad_R if grad_R is None or poison is None else grad_R * poison

    grad_logprob_T, grad_entropy_T, grad_logsumexp_T = gradients
    hidden_RD = head.hidden[index_R]
    if real_R is not None:
        hidden_RD = hidden_RD.masked_fill_(~real_R.unsqueeze(1), 0)
    active = _Active(
        index_R,
        real_R,
        arriving(grad_logprob_T),
        arriving(grad_entropy_T),
        arriving(grad_logsumexp_T),
        pick(head.target),
        pick(head.temperature_T, 1),
        pick(rows.entropy),
        pick(rows.max, torch.inf),
        pick(rows.log_sum),
    )
    return hidden_RD, active, poison


def _gradients(
    hidden_RD: Tensor,
    active: _Active,
    head: Head,
    logits_TV: Tensor | None,
    needs: _Needs,
    main_grad: Tensor | None,
) -> Gradients:
    """One pass over the vocabulary, and a product of [R, V, D] for each gradient that is needed."""
    count, vocabulary = hidden_RD.shape[0], head.weight.shape[0]
    block_t, block_v = sizes(hidden_RD)
    e_buffer = workspace(count, vocabulary, hidden_RD)
    fp32 = torch.float32
    dhidden_RD = torch.zeros_like(hidden_RD, dtype=fp32) if needs.hidden else None
    own = needs.weight and main_grad is None
    dweight_VD = _empty_like(head.weight) if own else None
    dbias_V = hidden_RD.new_zeros(vocabulary, dtype=fp32) if needs.bias else None

    for v in slices(vocabulary, block_v):
        weight = compute_dtype(head.weight[v])
        dweight = None
        for chunk in slices(count, block_t):
            some, hidden = active.chunk(chunk), compute_dtype(hidden_RD[chunk])
            stored = None if logits_TV is None else logits_TV[some.number, v]
            if stored is not None and some.real is not None:
                stored.masked_fill_(~some.real.unsqueeze(1), 0)
            z = logits(hidden, weight, head, v) if stored is None else stored
            dz = _dlogits(z, some, head.softcap, v, e_buffer, fp32 if needs.bias else hidden.dtype)
            if dbias_V is not None:
                dbias_V[v] += dz.sum(0)
            dz = dz.to(hidden.dtype)
            if needs.weight:
                part = product(dz.T, hidden)
                dweight = part if dweight is None else dweight.add_(part)
            if dhidden_RD is not None:
                dhidden_RD[chunk] += product(dz, weight)
        if dweight_VD is not None:
            dweight_VD[v] = 0 if dweight is None else dweight
        elif main_grad is not None and dweight is not None:
            main_grad[v] += dweight
    if dbias_V is not None and head.bias is not None:
        dbias_V = dbias_V.to(head.bias.dtype)
    return dhidden_RD, dweight_VD, dbias_V


def _dlogits(
    z_RV: Tensor,
    rows: _Active,
    softcap: float | None,
    v: slice,
    buffer: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of one block of logits h W^T + b, in `dtype` or fp32; the block is overwritten.

    With d = (z - max) / temperature, off the target dz_j = exp(d_j) (a - b d_j), where a and b have
    the factor exp(-log_sum). At the target g_logprob (1 - p) comes from expm1, which keeps its
    digits when p is near 1.
    """
    zero = torch.zeros_like(rows.entropy)
    g_logprob, g_entropy, g_logsumexp = (
        zero if grad is None else grad
        for grad in (rows.grad_logprob, rows.grad_entropy, rows.grad_logsumexp)
    )
    if rows.temperature is not None:
        g_logprob, g_entropy = g_logprob / rows.temperature, g_entropy / rows.temperature
        g_logsumexp = g_logsumexp / rows.temperature
    rest = g_logsumexp - g_entropy * rows.entropy

    slope_RV = None
    if softcap is not None:
        slope_RV = 1 - z_RV.div_(softcap).tanh_().square()
        z_RV.mul_(softcap)
    d_RV = z_RV.sub_(rows.max.unsqueeze(1))
    if rows.temperature is not None:
        d_RV.div_(rows.temperature.unsqueeze(1))
    column, inside = target_column(rows.target, v)
    logp_target = (d_RV.gather(1, column).squeeze(1) - rows.log_sum).clamp_min(LOWEST_EXPONENT)
    dz_target = logp_target.exp() * (rest - g_entropy * logp_target)
    dz_target -= g_logprob * logp_target.expm1()

    a_R1 = (rest - g_logprob + g_entropy * rows.log_sum).unsqueeze(1)
    scale_R1 = (-rows.log_sum).exp().unsqueeze(1)
    e_RV = _exp(d_RV, view(buffer, *z_RV.shape), rows.grad_entropy is not None)
    rounds = slope_RV is None and dtype != torch.float32
    out_RV = torch.empty_like(e_RV, dtype=dtype) if rounds else e_RV
    if rows.grad_entropy is None:
        dz_RV = torch.mul(e_RV, a_R1 * scale_R1, out=out_RV)
    else:
        b_R1 = -(g_entropy.unsqueeze(1) * scale_R1)
        if few_passes(d_RV):
            torch.addcmul(a_R1 * scale_R1, d_RV, b_R1, out=d_RV)
        else:
            d_RV.mul_(b_R1).add_(a_R1 * scale_R1)
        dz_RV = torch.mul(d_RV, e_RV, out=out_RV)
    elsewhere = dz_RV.gather(1, column).squeeze(1)
    at_target = torch.where(inside, dz_target.to(dz_RV.dtype), elsewhere)
    dz_RV.scatter_(1, column, at_target.unsqueeze(1))
    return dz_RV if slope_RV is None else dz_RV.mul_(slope_RV)


def _exp(d_RV: Tensor, e_RV: Tensor, multiplied: bool) -> Tensor:
    """exp(d), exactly 0 where d is -inf; d becomes finite where it is `multiplied`."""
    if few_passes(d_RV):
        if multiplied:
            d_RV.clamp_min_(EXPONENT_OF_ZERO)
        return torch.exp(d_RV, out=e_RV)
    torch.exp(d_RV.clamp_min_(LOWEST_EXPONENT), out=e_RV)
    return torch.threshold_(e_RV, 2e-38, 0.0)


def _empty_like(weight_VD: Tensor) -> Tensor:
    return torch.empty(weight_VD.shape, dtype=weight_VD.dtype, device=weight_VD.device)
