"""The head over the set of ids that a sampler kept of each token: log-prob, entropy, gradients.

With S_t the set of token t, z its logits and d = (z - max) / temperature over the set,

    s = sum of exp(d) without one maximum,   t = sum of d exp(d)
    logprob = d_target - log1p(s),   entropy = log1p(s) - t / (1 + s)
    dz_j = [g_logprob (1[j = target] - p_j) - g_entropy p_j (log p_j + H)] / temperature,   j in S_t

A set of one has p = 1: it needs no logit and gets no gradient. Values of pairs are fp64, of which
there are as many as ids in sets; the three products with D columns are the backend's, fp32.

Where nobody has looked, as on a GPU, a row whose set is wrong has NaN outputs and gradients.

T tokens, D hidden, V vocabulary, N pairs of a token and an id of its set, P pairs of those.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import _rows
from ._pair_products import pair_dots, pair_sums
from ._torch.statistics import finish_statistics
from .distributed import all_reduce_sum, gather_counts
from .head import Head
from .support import Support


class Run(NamedTuple):
    """How the head runs."""

    impl: str
    max_active_rows: int | None
    main_grad: Tensor | None
    statistics_wanted: int
    group: ProcessGroup | None
    """The ranks that share the vocabulary, in the order of their rows of the weight."""


class _Columns(NamedTuple):
    """This rank's rows of the weight: ids from `first` on, of `total` over all ranks."""

    first: int | Tensor
    total: int | Tensor


@torch.compiler.disable
def linear_logprob_entropy(head: Head, support: Support, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """logprob and entropy, fp32 [T], and statistics, fp32 [6, T] or empty, of a flat head."""
    columns = _columns(head, support, run.group)
    if _rows.sees_values(head.hidden.device):
        _rows.check_values(head, int(columns.total))
        support.check_values(head.target, head.valid, int(columns.total))
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in (head.hidden, head.weight)]
    head = replace(head, hidden=rows[0], weight=rows[1])
    return _SupportHead.apply(*rows, head.bias, head, support, run, columns)


def _columns(head: Head, support: Support, group: ProcessGroup | None) -> _Columns:
    rows = head.weight.shape[0]
    if group is None:
        return _Columns(0, rows)
    if dist.get_rank(group) < 0:
        raise ValueError("vocab_group must be a group that this process belongs to")
    sizes = rows, head.target.shape[0], support.token_ids.shape[0]
    sizes_N3 = gather_counts(torch.stack([head.target.new_full((), x) for x in sizes]), group)
    if _rows.sees_values(head.hidden.device):
        for name, counts in (("tokens", sizes_N3[:, 1]), ("token_ids of sets", sizes_N3[:, 2])):
            if len(counts.unique()) > 1:
                raise ValueError(
                    f"every rank of vocab_group must have the same {name}; got {counts.tolist()} "
                    "of them"
                )
    return _Columns(sizes_N3[: dist.get_rank(group), 0].sum(), sizes_N3[:, 0].sum())


class _Pairs(NamedTuple):
    """Pairs that are computed: all, some of which `keep` leaves out, or those that it keeps."""

    number_P: Tensor | None  # of N; None: all
    row_P: Tensor
    id_P: Tensor  # counted from this rank's first row of the weight
    keep_P: Tensor | None


class _Sets(NamedTuple):
    """The support in the form that the sums below read."""

    row_N: Tensor
    id_N: Tensor
    sizes_T: Tensor
    wrong: Tensor | None  # bool []: offsets do not cover token_ids

    @staticmethod
    def of(support: Support) -> "_Sets":
        count, offsets, wrong = support.token_ids.numel(), support.offsets.long(), None
        if not _rows.sees_values(offsets.device):
            # Offsets that would lead out of memory become others that do not.
            offsets = offsets.clamp(0, count).cummax(0).values
            offsets[:1].fill_(0)
            offsets[-1:].fill_(count)
            wrong = (offsets != support.offsets).any()
        sizes_T = offsets.diff()
        row_N = torch.arange(len(sizes_T), device=sizes_T.device)
        row_N = row_N.repeat_interleave(sizes_T, output_size=count)
        return _Sets(row_N, support.token_ids.long(), sizes_T, wrong)

    def wrong_T(self, head: Head, columns: _Columns) -> Tensor:
        """Which rows have a target without a fitting set: it is not in it once, or a bad id is."""
        if _rows.sees_values(self.row_N.device):
            return torch.zeros_like(head.valid)
        outside_N = (self.id_N < 0) | (self.id_N >= columns.total)
        found_N = self.is_target(head).double().masked_fill(outside_N, torch.nan)
        wrong_T = head.valid & (self.sum(found_N) != 1)
        return wrong_T if self.wrong is None else wrong_T | head.valid & self.wrong

    def is_target(self, head: Head) -> Tensor:
        """Which pairs are a token and its target."""
        return self.id_N == head.target[self.row_N]

    def pairs(self, rows_T: Tensor, head: Head, columns: _Columns, compact: bool) -> _Pairs:
        """The pairs of the rows of `rows_T`, bool, whose ids this rank has."""
        own_N, rows = self.id_N - columns.first, head.weight.shape[0]
        keep_N = rows_T[self.row_N] & (own_N >= 0) & (own_N < rows)
        if not compact and rows:
            return _Pairs(None, self.row_N, own_N.clamp(0, rows - 1), keep_N)
        at = keep_N.nonzero().squeeze(1)
        return _Pairs(at, self.row_N[at], own_N[at], None)

    def sum(self, x_N: Tensor) -> Tensor:
        """Sums over the sets, [T]."""
        return torch.segment_reduce(x_N, "sum", lengths=self.sizes_T, initial=0.0, unsafe=True)

    def max(self, x_N: Tensor) -> Tensor:
        """Maxima over the sets, [T]; -inf of an empty one."""
        return torch.segment_reduce(x_N, "max", lengths=self.sizes_T, unsafe=True)


class _SupportHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        support: Support,
        run: Run,
        columns: _Columns,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sets = _Sets.of(support)
        wrong_T = sets.wrong_T(head, columns)
        live_T = head.valid & (sets.sizes_T > 1) | wrong_T
        pairs = sets.pairs(live_T, head, columns, _compacts(run.impl))
        product_P = pair_dots(run.impl, hidden_TD, weight_VD, *pairs[1:])
        if bias_V is not None:
            bias_P = bias_V[pairs.id_P].float()
            product_P += bias_P if pairs.keep_P is None else bias_P.where(pairs.keep_P, 0.0)
        z_N = product_P
        if pairs.number_P is not None:
            z_N = product_P.new_zeros(len(sets.row_N)).index_copy_(0, pairs.number_P, product_P)
        z_N = all_reduce_sum(z_N, run.group)
        logp_N, rows = _distribution(z_N, sets, live_T, wrong_T, head, run.statistics_wanted > 0)
        logprob_T, entropy_T, statistics = rows
        tensors, ctx.head_options = head.split()
        ctx.save_for_backward(z_N, logp_N, entropy_T, live_T, *sets, *tensors)
        ctx.run, ctx.columns = run, columns
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        return logprob_T.float(), entropy_T.float(), statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor | None, grad_entropy_T: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        z_N, logp_N, entropy_T, live_T, *rest = ctx.saved_tensors
        sets, head = _Sets(*rest[:4]), Head.joined(rest[4:], ctx.head_options)
        run, needs = ctx.run, ctx.needs_input_grad
        active_T = _rows.is_active((grad_T, grad_entropy_T), head.target, head.ignore_index)
        active_T &= live_T
        dz_N = _gradient(z_N, logp_N, entropy_T, grad_T, grad_entropy_T, sets, head)
        dz_N = dz_N.where(active_T[sets.row_N], 0.0).float()
        if (poison := _rows.beyond(active_T, run.max_active_rows)) is not None:
            dz_N *= poison
        pairs = sets.pairs(active_T, head, ctx.columns, _compacts(run.impl))
        dz_P = dz_N if pairs.number_P is None else dz_N[pairs.number_P]
        if pairs.keep_P is not None:
            dz_P = dz_P.where(pairs.keep_P, 0.0)
        dhidden_TD = dweight_VD = dbias_V = None
        if needs[0]:
            dhidden_TD = _hidden(dz_P, pairs, active_T, entropy_T, head, run)
        if needs[1] or needs[2]:
            order_P = pairs.id_P.argsort(stable=True)
            by_id = pairs.row_P[order_P], pairs.id_P[order_P]
            dz_P = dz_P[order_P]
            if needs[1]:
                dweight_VD = _weight(dz_P, by_id, head, run)
            if needs[2]:
                assert head.bias is not None
                ones_T1 = torch.ones(len(head.target), 1, device=dz_P.device)
                dbias_V = torch.zeros_like(head.bias)
                pair_sums(run.impl, dz_P, ones_T1, *by_id, dbias_V.unsqueeze(1))
        return dhidden_TD, dweight_VD, dbias_V, None, None, None, None


def _compacts(impl: str) -> bool:
    """Whether pairs that are not needed are left out by the host; else by the kernels."""
    return impl not in ("triton", "cuda")


def _distribution(
    z_N: Tensor,
    sets: _Sets,
    live_T: Tensor,
    wrong_T: Tensor,
    head: Head,
    with_statistics: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """log p of each pair, fp64; log-prob and entropy, fp64 [T], statistics, fp32 [6, T] or [0]."""
    row_N, z_N = sets.row_N, z_N.double()
    if head.softcap is not None:
        z_N = head.softcap * torch.tanh(z_N / head.softcap)
    if head.temperature_T is not None:
        z_N = z_N / head.temperature_T[row_N]
    max_T = sets.max(z_N)
    # A row of -inf throughout has no distribution, nor has one with inf.
    max_T = torch.where(max_T.isfinite() & ~wrong_T, max_T, torch.nan).where(live_T, 0.0)
    d_N = z_N.where(live_T[row_N], 0.0) - max_T[row_N]
    # The first maximum of each set is left out of the sums.
    number_N = torch.arange(len(row_N), device=row_N.device)
    at_max_N = number_N.where(d_N == 0, len(row_N)).double()
    first_T = -sets.max(-at_max_N)
    e_N = d_N.exp().masked_fill(number_N == first_T[row_N], 0.0)
    finite_N = d_N.masked_fill(d_N == -torch.inf, 0.0)  # where exp(d) is 0 every term is
    s_T, t_T = sets.sum(e_N), sets.sum(e_N * finite_N)
    log_sum_T = s_T.log1p()
    logp_N = d_N - log_sum_T[row_N]

    def rows(x_T: Tensor, of_one: float | Tensor = 0.0) -> Tensor:
        """Those of live rows; a set of one has `of_one`, a wrong one NaN."""
        alone_T = head.valid & ~live_T
        return x_T.where(live_T, torch.where(alone_T, of_one, 0.0)).masked_fill(wrong_T, torch.nan)

    logprob_T = rows(sets.sum(logp_N.where(sets.is_target(head), 0.0)))
    entropy_T = rows(log_sum_T - t_T / (1 + s_T))
    statistics = torch.empty(0, device=z_N.device)
    if with_statistics:
        more = [sets.sum(x_N) for x_N in (e_N * finite_N**2, e_N**2, e_N**2 * finite_N)]
        # Sets are in no order: the first maximum is that of the lowest id.
        lowest_T = -sets.max(-sets.id_N.double().masked_fill(d_N != 0, torch.inf))
        no_mean_T = torch.zeros_like(s_T)
        sums = torch.stack([s_T, t_T, *more])
        statistics = finish_statistics(sums, no_mean_T, lowest_T == head.target)
        of_one_61 = statistics.new_zeros(6, 1)
        of_one_61[1:3] = of_one_61[5:] = 1.0  # max_prob, sum_p2 and is_top1
        statistics = rows(statistics, of_one_61)
    return logp_N, (logprob_T, entropy_T, statistics)


def _gradient(
    z_N: Tensor,
    logp_N: Tensor,
    entropy_T: Tensor,
    grad_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    sets: _Sets,
    head: Head,
) -> Tensor:
    """The gradient of each pair's product h . w + b, fp64 [N]."""
    row_N, p_N = sets.row_N, logp_N.exp()
    dz_N = torch.zeros_like(p_N)
    if grad_T is not None:
        slope_N = torch.where(sets.is_target(head), -logp_N.expm1(), -p_N)
        dz_N += grad_T.double()[row_N] * slope_N
    if grad_entropy_T is not None:
        slope_N = (p_N * (logp_N + entropy_T[row_N])).masked_fill(logp_N == -torch.inf, 0.0)
        dz_N -= grad_entropy_T.double()[row_N] * slope_N
    if head.temperature_T is not None:
        dz_N /= head.temperature_T[row_N]
    if head.softcap is not None:
        dz_N *= 1 - torch.tanh(z_N.double() / head.softcap).square()
    return dz_N


def _hidden(
    dz_P: Tensor, pairs: _Pairs, active_T: Tensor, entropy_T: Tensor, head: Head, run: Run
) -> Tensor:
    hidden_TD, group, most = head.hidden, run.group, run.max_active_rows
    dtype = hidden_TD.dtype if group is None else torch.float32
    out_TD = torch.zeros(hidden_TD.shape, dtype=dtype, device=hidden_TD.device)
    if not _rows.sees_values(hidden_TD.device):
        # A row with a wrong set may have no pair that could be NaN, or none that is kept.
        out_TD.masked_fill_((active_T & entropy_T.isnan()).unsqueeze(1), torch.nan)
    pair_sums(run.impl, dz_P, head.weight, pairs.id_P, pairs.row_P, out_TD)
    if group is None:
        return out_TD
    if most is None:
        index_R = active_T.nonzero().squeeze(1)
    else:
        # Places left over are of row 0: the same sum again.
        size = min(most, active_T.numel())
        index_R = torch.nonzero_static(active_T, size=size).squeeze(1).clamp_min(0)
    if index_R.numel():
        out_TD[index_R] = all_reduce_sum(out_TD[index_R], group)
    return out_TD.to(hidden_TD.dtype)


def _weight(dz_P: Tensor, by_id: tuple[Tensor, Tensor], head: Head, run: Run) -> Tensor | None:
    """The weight's gradient, zero outside of the sets; None where it is added to main_grad."""
    if run.main_grad is not None:
        pair_sums(run.impl, dz_P, head.hidden, *by_id, run.main_grad, add=True)
        return None
    weight = head.weight
    out_VD = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    pair_sums(run.impl, dz_P, head.hidden, *by_id, out_VD)
    return out_VD
