"""The head over the set of ids that a sampler kept of each token: log-prob, entropy, gradients.

With S_t the set of token t, z its logits and d = (z - max) / temperature over the set,

    s = sum of exp(d) without one maximum,   t = sum of d exp(d)
    logprob = d_target - log1p(s),   entropy = log1p(s) - t / (1 + s)
    dz_j = [g_logprob (1[j = target] - p_j) - g_entropy p_j (log p_j + H)] / temperature,   j in S_t

A set of one has p = 1: it needs no logit and gets no gradient. Values of pairs are fp64, of which
there are as many as ids in sets; the three products with D columns are the backend's, fp32.

T tokens, D hidden, V vocabulary, N pairs of a token and an id of its set, P pairs of those.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ._pair_products import pair_dots, pair_sums
from ._rows import check_values, is_active, sees_values
from ._torch.statistics import finish_statistics
from .distributed import all_reduce_sum, gather_counts
from .head import Head
from .support import Support


class Run(NamedTuple):
    """How the head runs."""

    impl: str
    max_active_rows: int | None
    main_grad: Tensor | None
    with_statistics: bool
    group: ProcessGroup | None
    """The ranks that share the vocabulary, in the order of their rows of the weight."""


class _Columns(NamedTuple):
    """This rank's rows of the weight: ids from `first` on, of `total` over all ranks."""

    first: int
    total: int


@torch.compiler.disable
def linear_logprob_entropy(head: Head, support: Support, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """logprob and entropy, fp32 [T], and statistics, fp32 [4, T] or empty, of a flat head."""
    columns = _columns(head, run.group)
    if sees_values(head.hidden.device):
        check_values(head, columns.total)
        support.check_values(head.target, head.valid, columns.total)
    return _SupportHead.apply(head.hidden, head.weight, head.bias, head, support, run, columns)


def _columns(head: Head, group: ProcessGroup | None) -> _Columns:
    rows = head.weight.shape[0]
    if group is None:
        return _Columns(0, rows)
    if dist.get_rank(group) < 0:
        raise ValueError("vocab_group must be a group that this process belongs to")
    rows_N = gather_counts(head.target.new_full((), rows), group)
    return _Columns(int(rows_N[: dist.get_rank(group)].sum()), int(rows_N.sum()))


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

    @staticmethod
    def of(support: Support) -> "_Sets":
        sizes_T = support.sizes
        row_N = torch.arange(len(sizes_T), device=sizes_T.device)
        row_N = row_N.repeat_interleave(sizes_T, output_size=support.token_ids.numel())
        return _Sets(row_N, support.token_ids.long(), sizes_T)

    def pairs(self, rows_T: Tensor, head: Head, columns: _Columns, compact: bool) -> _Pairs:
        """The pairs of the rows of `rows_T`, bool, whose ids this rank has."""
        own_N = self.id_N - columns.first
        keep_N = rows_T[self.row_N] & (own_N >= 0) & (own_N < head.weight.shape[0])
        if not compact:
            return _Pairs(None, self.row_N, own_N.where(keep_N, 0), keep_N)
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
        live_T = head.valid & (sets.sizes_T > 1)
        pairs = sets.pairs(live_T, head, columns, _compacts(run.impl))
        product_P = pair_dots(run.impl, hidden_TD, weight_VD, *pairs[1:])
        if bias_V is not None:
            bias_P = bias_V[pairs.id_P].float()
            product_P += bias_P if pairs.keep_P is None else bias_P.where(pairs.keep_P, 0.0)
        z_N = product_P
        if pairs.number_P is not None:
            z_N = product_P.new_zeros(len(sets.row_N)).index_copy_(0, pairs.number_P, product_P)
        z_N = all_reduce_sum(z_N, run.group)
        logp_N, rows = _distribution(z_N, sets, live_T, head)
        tensors, ctx.head_options = head.split()
        ctx.save_for_backward(z_N, logp_N, rows[1], live_T, *sets, *tensors)
        ctx.run, ctx.columns = run, columns
        ctx.set_materialize_grads(False)
        logprob_T, entropy_T, statistics = rows
        if not run.with_statistics:
            statistics = statistics[:0].flatten()
        ctx.mark_non_differentiable(statistics)
        return logprob_T.float(), entropy_T.float(), statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_T: Tensor | None, grad_entropy_T: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        z_N, logp_N, entropy_T, live_T, *rest = ctx.saved_tensors
        sets, head = _Sets(*rest[:3]), Head.joined(rest[3:], ctx.head_options)
        run, needs = ctx.run, ctx.needs_input_grad
        active_T = is_active((grad_T, grad_entropy_T), head.target, head.ignore_index) & live_T
        poison = _beyond(active_T, run)
        dz_N = _gradient(z_N, logp_N, entropy_T, grad_T, grad_entropy_T, sets, head)
        dz_N = dz_N.where(active_T[sets.row_N], 0.0).float()
        pairs = sets.pairs(active_T, head, ctx.columns, _compacts(run.impl))
        dz_P = dz_N if pairs.number_P is None else dz_N[pairs.number_P]
        if pairs.keep_P is not None:
            dz_P = dz_P.where(pairs.keep_P, 0.0)
        dhidden_TD = _hidden(dz_P, pairs, head, run) if needs[0] else None
        dweight_VD = dbias_V = None
        if needs[1] or needs[2]:
            order_P = pairs.id_P.argsort(stable=True)
            by_id = pairs.row_P[order_P], pairs.id_P[order_P]
            dz_P = dz_P[order_P]
            if needs[1]:
                dweight_VD = _weight(dz_P, by_id, head, run)
            if needs[2] and head.bias is not None:
                ones_T1 = torch.ones(len(head.target), 1, device=dz_P.device)
                dbias_V = torch.zeros_like(head.bias)
                pair_sums(run.impl, dz_P, ones_T1, *by_id, dbias_V.unsqueeze(1))
        if poison is not None:
            into = dweight_VD if run.main_grad is None else run.main_grad
            for gradient in (dhidden_TD, into if needs[1] else None, dbias_V):
                if gradient is not None:
                    gradient.mul_(poison)
        return dhidden_TD, dweight_VD, dbias_V, None, None, None, None


def _compacts(impl: str) -> bool:
    """Whether pairs that are not needed are left out by the host; else by the kernels."""
    return impl not in ("triton", "cuda")


def _distribution(
    z_N: Tensor, sets: _Sets, live_T: Tensor, head: Head
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """log p of each pair, fp64, and log-prob and entropy, fp64 [T], statistics, fp32 [4, T]."""
    row_N, z_N = sets.row_N, z_N.double()
    if head.softcap is not None:
        z_N = head.softcap * torch.tanh(z_N / head.softcap)
    if head.temperature_T is not None:
        z_N = z_N / head.temperature_T[row_N]
    max_T = sets.max(z_N)
    # A row of -inf throughout has no distribution, nor has one with inf.
    max_T = torch.where(max_T.isfinite(), max_T, torch.nan).where(live_T, 0.0)
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
    is_target_N = sets.id_N == head.target[row_N]
    logprob_T = sets.sum(logp_N.where(is_target_N, 0.0))
    # On a GPU, where nobody has looked: a target that is not in its set, or is there twice.
    logprob_T = logprob_T.where(sets.sum(is_target_N.double()) == 1, torch.nan)
    entropy_T = log_sum_T - t_T / (1 + s_T)
    more = [sets.sum(x_N) for x_N in (e_N * finite_N**2, e_N**2, e_N**2 * finite_N)]
    statistics = finish_statistics(torch.stack([s_T, t_T, *more]))
    alone_T = head.valid & (sets.sizes_T == 1)
    certain = statistics.new_tensor([0.0, 1.0, 1.0, 0.0]).unsqueeze(1)
    statistics = statistics.where(live_T, torch.where(alone_T, certain, 0.0))
    return logp_N, (logprob_T.where(live_T, 0.0), entropy_T.where(live_T, 0.0), statistics)


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
        is_target_N = sets.id_N == head.target[row_N]
        dz_N += grad_T.double()[row_N] * torch.where(is_target_N, -logp_N.expm1(), -p_N)
    if grad_entropy_T is not None:
        slope_N = (p_N * (logp_N + entropy_T[row_N])).masked_fill(logp_N == -torch.inf, 0.0)
        dz_N -= grad_entropy_T.double()[row_N] * slope_N
    if head.temperature_T is not None:
        dz_N /= head.temperature_T[row_N]
    if head.softcap is not None:
        dz_N *= 1 - torch.tanh(z_N.double() / head.softcap).square()
    return dz_N


def _beyond(active_T: Tensor, run: Run) -> Tensor | None:
    """With a bound for the active rows, a factor of every gradient: NaN beyond it."""
    if run.max_active_rows is None:
        return None
    count = active_T.sum()
    if sees_values(active_T.device):
        if int(count) > run.max_active_rows:
            raise ValueError(
                f"max_active_rows is {run.max_active_rows}; got gradients at {int(count)} rows"
            )
        return None
    return torch.where(count <= run.max_active_rows, 1.0, torch.nan)


def _hidden(dz_P: Tensor, pairs: _Pairs, head: Head, run: Run) -> Tensor:
    dtype = head.hidden.dtype if run.group is None else torch.float32
    out_TD = torch.zeros(head.hidden.shape, dtype=dtype, device=head.hidden.device)
    pair_sums(run.impl, dz_P, head.weight, pairs.id_P, pairs.row_P, out_TD)
    return all_reduce_sum(out_TD, run.group).to(head.hidden.dtype)


def _weight(dz_P: Tensor, by_id: tuple[Tensor, Tensor], head: Head, run: Run) -> Tensor | None:
    """The weight's gradient, zero outside of the sets; None where it is added to main_grad."""
    if run.main_grad is not None:
        pair_sums(run.impl, dz_P, head.hidden, *by_id, run.main_grad, add=True)
        return None
    weight = head.weight
    out_VD = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    pair_sums(run.impl, dz_P, head.hidden, *by_id, out_VD)
    return out_VD
