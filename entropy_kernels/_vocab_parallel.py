"""The head with the rows of its weight divided among the ranks of a process group.

On each rank a backend computes its columns' maximum m_i, L_i = log sum exp((z - m_i) / temperature)
and entropy H_i and, where the target is among them, its log-probability. With m = max_i m_i,
shift_i = (m_i - m) / temperature and Z_i = exp(L_i), those of all columns follow from sums over the
ranks of terms of one sign:

    1 + s = sum_i exp(shift_i) Z_i,   t = sum_i exp(shift_i) Z_i (L_i - H_i + shift_i)
    log-sum-exp = m / temperature + log1p(s),   H = log1p(s) - t / (1 + s)

A rank whose maximum is m adds its share of s by expm1(L_i) and its 1 to a count, so that s keeps
its digits when the rest of the vocabulary has a mass of 1e-12. What backends return is fp32, these
sums are fp64. Statistics are moved likewise; _torch/statistics.py finishes them. The mean logit is
a sum over ranks too. The first of the largest logits lies on the first rank whose maximum is m.

Backward runs on each rank's rows of the weight, with the maximum and sums of all columns.

T tokens, R active rows, D hidden, V vocabulary, N ranks.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import _rows, backends, ops
from ._rows import ForwardRows, check_values
from ._torch.statistics import finish_statistics
from .distributed import all_reduce_max, all_reduce_sum, gather_counts
from .head import Head

# What stands for the maximum of no logit at all, or of -inf throughout; finite, as -inf - m is not.
_LOWEST = -1e30
_IGNORED, _ELSEWHERE = -100, -1


class _Shard(NamedTuple):
    """This rank's columns; its targets count from its own first row."""

    group: ProcessGroup
    target_T: Tensor  # _IGNORED, or _ELSEWHERE where another rank has it
    in_range_T: Tensor  # whether a rank has it, or it is ignored
    masked: Tensor  # bool []: every logit is -inf
    share: Tensor  # fp64 []: of the vocabulary


class _Run(NamedTuple):
    """How the head runs on this rank."""

    impl: str
    keep_logits: bool
    max_active_rows: int | None
    main_grad: Tensor | None
    statistics_wanted: int


def linear_logprob_entropy(
    head: Head, group: ProcessGroup, **run: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, logsumexp and statistics, as the op's, of the vocabulary of all ranks.

    head.weight, head.bias, main_grad: this rank's rows, any number of them, in the order of ranks.
    All else is the same on every rank of `group`, hidden too; targets count from the first rank's
    first row. `run` is what `_Run` holds.

    Forward all-reduces two int64 per rank, the maximum (4 T bytes) and one tensor of sums (32 T
    bytes, with statistics 64 T, and 4 T more). Backward all-reduces the hidden states' gradient of
    the active rows (4 R D bytes). All ranks must agree which rows are active, as they do where the
    loss is computed from these outputs.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("vocab_group must be a group that this process belongs to")
    options, weight_VD, bias_V, target_T = _Run(**run), head.weight, head.bias, head.target
    rows, tokens = weight_VD.shape[0], target_T.shape[0]
    sizes = [target_T.new_full((), size) for size in (rows, tokens)]
    sizes_N2 = gather_counts(torch.stack(sizes), group)
    first, total = sizes_N2[: dist.get_rank(group), 0].sum(), sizes_N2[:, 0].sum()
    if _rows.sees_values(target_T.device):
        _check(sizes_N2)
        check_values(head, int(total))
    none = weight_VD.new_zeros((), dtype=torch.bool)
    if rows == 0:
        # A backend has at least one row: this one has no part in any sum and gets no gradient.
        weight_VD = torch.cat([weight_VD, weight_VD.new_zeros(1, weight_VD.shape[1])])
        bias_V = weight_VD[:0, 0] if bias_V is None else bias_V
        bias_V = torch.cat([bias_V, bias_V.new_full((1,), -torch.inf)])
        masked, options = ~none, options._replace(main_grad=None)
    else:
        masked = (
            none if bias_V is None or head.softcap is not None else (bias_V == -torch.inf).all()
        )

    own_T = target_T - first
    own_T = own_T.where((own_T >= 0) & (own_T < rows), _ELSEWHERE)
    own_T = own_T.masked_fill(~head.valid, _IGNORED)
    in_range_T = ~head.valid | (target_T >= 0) & (target_T < total)
    shard = _Shard(group, own_T, in_range_T, masked, rows / total.double())
    head = replace(head, weight=weight_VD, bias=bias_V, target=own_T, ignore_index=_IGNORED)
    return _Sharded.apply(head.hidden, head.weight, head.bias, head, shard, options)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        shard: _Shard,
        run: _Run,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Any row of this rank stands for another one's target: its log-prob is not used.
        target_T = head.target.masked_fill(head.target == _ELSEWHERE, 0)
        *own_rows, logits, _, statistics = ops.linear_logprob_entropy(
            **ops.in_schema(replace(head, target=target_T)),
            keep_logits=run.keep_logits,
            max_active_rows=None,
            main_grad=None,
            impl=run.impl,
            statistics_wanted=run.statistics_wanted,
        )
        rows_T, statistics = _merge(own_rows, statistics, shard, head.temperature_T)
        logprob_T, entropy_T, logsumexp_T, max_T, log_sum_T = rows_T
        tensors, ctx.head_options = head.split()
        ctx.save_for_backward(entropy_T, max_T, log_sum_T, logits, *tensors)
        ctx.group, ctx.run = shard.group, run
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        return logprob_T, entropy_T, logsumexp_T, statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_logprob_T: Tensor | None,
        grad_entropy_T: Tensor | None,
        grad_logsumexp_T: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        entropy_T, max_T, log_sum_T, logits, *tensors = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        dhidden_TD, dweight_VD, dbias_V = backends.backward(
            ctx.run.impl,
            (grad_logprob_T, grad_entropy_T, grad_logsumexp_T),
            Head.joined(tensors, ctx.head_options),
            ForwardRows.for_backward(entropy_T, max_T, log_sum_T, logits),
            (need_hidden, need_weight, need_bias),
            max_active_rows=ctx.run.max_active_rows,
            main_grad=ctx.run.main_grad,
            reduce_hidden=functools.partial(_add_over_ranks, group=ctx.group),
        )
        return dhidden_TD, dweight_VD, dbias_V, None, None, None


def _add_over_ranks(rows_RD: Tensor, _: Tensor, group: ProcessGroup) -> None:
    if rows_RD.numel():
        dist.all_reduce(rows_RD, group=group)


def _check(sizes_N2: Tensor) -> None:
    rows, tokens = sizes_N2.T.tolist()
    if len(set(tokens)) > 1:
        raise ValueError(
            f"every rank of vocab_group must have the same tokens; got {tokens} of them"
        )
    if sum(rows) == 0:
        raise ValueError("weight must have V > 0 rows over all ranks of vocab_group; got 0")


def _merge(
    own_rows: list[Tensor], statistics: Tensor, shard: _Shard, temperature_T: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """logprob, entropy, logsumexp, max and log sum, and statistics [6, T] if there are any.

    A NaN of any rank poisons the row on all of them, by way of the sums.
    """
    logprob_T, entropy_T, _, own_max_T, log_sum_T = (x.double() for x in own_rows)
    lost_T = own_max_T.isnan() | shard.masked
    max_T = all_reduce_max(own_rows[3].masked_fill(lost_T, _LOWEST), shard.group)
    shift_T = own_max_T - max_T
    if temperature_T is not None:
        shift_T = shift_T / temperature_T

    mass_T = (log_sum_T + shift_T).exp()
    mean_T = log_sum_T - entropy_T + shift_T
    is_top_T = shift_T == 0
    terms = [is_top_T.double(), log_sum_T.expm1().where(is_top_T, mass_T), mass_T * mean_T]
    terms += _statistics_terms(statistics, mass_T, mean_T, log_sum_T + shift_T)
    sums = torch.stack(terms).masked_fill(shard.masked, 0)
    if statistics.numel():
        sums = torch.cat([sums, _mean_logit_term(statistics, shard)])
    # Its distance from the maximum, known to one rank.
    distance_T = (logprob_T + log_sum_T + shift_T).masked_fill(shard.masked, -torch.inf)
    distance_T = distance_T.where(shard.target_T >= 0, 0)
    sums = all_reduce_sum(torch.cat([distance_T[None], sums]), shard.group)

    distance_T, top_T, s_T, t_T, *more = sums
    s_T = s_T + (top_T - 1)
    total_T = s_T.log1p()
    peak_T = max_T.double() if temperature_T is None else max_T.double() / temperature_T
    rows = [distance_T - total_T, total_T - t_T / (1 + s_T), peak_T + total_T, max_T, total_T]
    has_answer_T = shard.in_range_T & (max_T > _LOWEST) & ~s_T.isnan()
    ignored_T = shard.target_T == _IGNORED
    rows = [x.float().where(has_answer_T, torch.nan).masked_fill(ignored_T, 0) for x in rows]
    if more:
        u_T, squares_T, t2_T, mean_logit_T = more
        merged = torch.stack([s_T, t_T, u_T, squares_T - 1, t2_T])
        is_top1_T = _is_top1(statistics, is_top_T, shard)
        statistics = finish_statistics(merged, mean_logit_T, is_top1_T)
        statistics = statistics.where(has_answer_T, torch.nan).masked_fill(ignored_T, 0)
    return rows, statistics


def _statistics_terms(
    statistics: Tensor, mass_T: Tensor, mean_T: Tensor, log_mass_T: Tensor
) -> list[Tensor]:
    """This rank's part of u, 1 + s2 and t2, from the first of its statistics [S, T]."""
    if statistics.numel() == 0:
        return []
    varentropy_T, _, sum_p2_T, sum_p2_logp_T, *_ = statistics.double()
    return [
        mass_T * (varentropy_T + mean_T.square()),
        mass_T.square() * sum_p2_T,
        mass_T.square() * (sum_p2_logp_T + log_mass_T * sum_p2_T),
    ]


def _mean_logit_term(statistics: Tensor, shard: _Shard) -> Tensor:
    """This rank's part of the mean logit, fp64 [1, T]; that of -inf throughout is -inf."""
    nothing = torch.where(shard.share > 0, -torch.inf, 0.0)
    mean_1T = statistics[4:5].double() * shard.share
    return torch.where(shard.masked, nothing, mean_1T)


def _is_top1(statistics: Tensor, is_top_T: Tensor, shard: _Shard) -> Tensor:
    """Whether the target is the first maximum of the first rank that has the largest logit."""
    own_T = (statistics[5] == 1) & (shard.target_T >= 0)
    before = dist.get_world_size(shard.group) - dist.get_rank(shard.group)
    # The largest is of the first such rank, and odd where it has the target there.
    code_T = torch.where(is_top_T, 2.0 * before + own_T, 0.0).float()
    return all_reduce_max(code_T, shard.group) % 2 == 1
