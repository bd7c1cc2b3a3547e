"""Heads of every kind, and their results by the specification in three precisions.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._bounds import GpuArithmetic, assert_within_two_bounds, worst_elements, worst_of_orders
from ..head import Head
from ..support import Support
from .launches import Inputs

ROWS = ["peaked", "uniform", "tied", "very negative", "large"]
LOW_ENTROPY = 0.01  # nats
# What fp64 errs in an entropy: its formula takes 1 from a probability near 1.
TRUTH_ERROR = 4 * torch.finfo(torch.float64).eps
# Rows of a block whose logits are held, or as many as fit.
BLOCK, BLOCK_BYTES = 256, 1 << 26
# Tensors, and None for what is not there.
Results = list[Any]


def peaked_head(
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`testing.peaked_head`, drawn on the device and in larger blocks.

    wide: entropies from 1e-9 to 10 nats, log-uniform, in place of a reasoning model's.
    """
    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"device": device, "generator": generator}
    weight_VD = torch.randn(vocabulary, hidden, **on).div_(hidden**0.5)
    candidates = torch.randint(vocabulary, (tokens, min(6, vocabulary)), **on)
    gaps = (0.3 + torch.rand(candidates.shape, **on)).cumsum(1)
    wanted_T = 10 ** torch.linspace(-9, 1, tokens) if wide else entropy_quantiles(tokens)
    wanted_T = wanted_T.to(device)[torch.randperm(tokens, **on)]
    wanted_T = wanted_T.clamp_max(0.9 * torch.tensor(float(vocabulary)).log().item())

    hidden_TD = torch.empty(tokens, hidden, device=device)
    target_T = torch.empty(tokens, dtype=torch.int64, device=device)
    block = max(BLOCK, BLOCK_BYTES // (4 * vocabulary))
    for start in range(0, tokens, block):
        rows = slice(start, start + block)
        words = weight_VD[candidates[rows]]
        direction = torch.einsum("tc,tcd->td", (-gaps[rows]).exp(), words)
        direction += 0.01 * torch.randn(direction.shape, **on)
        z_RV = direction @ weight_VD.T
        scale = scale_to_entropy(z_RV, wanted_T[rows])
        hidden_TD[rows] = direction * scale
        p_RV = z_RV.mul_(scale).softmax(1)
        target_T[rows] = torch.multinomial(p_RV, 1, generator=generator).squeeze(1)
    return hidden_TD.to(dtype), weight_VD.to(dtype), target_T


def entropy_quantiles(count: int) -> Tensor:
    """Half log-uniform in [1e-6, 0.01], then log-linear to 0.672 at 0.8, then linear to 3.5."""
    q = (torch.arange(count) + 0.5) / max(count, 1)
    low = 10 ** (-6 + 8 * q)
    middle = 10 ** (-2 + (q - 0.5) / 0.3 * (torch.tensor(0.672).log10() + 2))
    high = 0.672 + (q - 0.8) / 0.2 * (3.5 - 0.672)
    return torch.where(q < 0.5, low, torch.where(q < 0.8, middle, high))


def scale_to_entropy(z_TV: Tensor, wanted_T: Tensor) -> Tensor:
    """The factor [T, 1] that gives each row of logits the wanted entropy, by bisection."""
    low, high = torch.zeros_like(wanted_T), 60 / z_TV.abs().amax(1)
    for _ in range(30):
        middle = (low + high) / 2
        p_TV = (z_TV * middle.unsqueeze(1)).softmax(1)
        flat = torch.special.entr(p_TV).sum(1) > wanted_T
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return high.unsqueeze(1)


def bend(rows: str, h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A head whose logits are peaked, changed so that they are of kind `rows`."""
    V = len(w)
    if rows == "uniform":
        h = torch.zeros_like(h)
    elif rows == "tied":
        w = w[: max(V // 2, 1)].repeat(3, 1)[:V]
    elif rows == "very negative":
        h[:, 0], w[:, 0] = 20.0, -20.0
    elif rows == "large":
        h = h / h.norm(dim=1, keepdim=True).clamp_min(1e-6) * 200
    return h, w, y


def run(
    function: Callable[..., Sequence[Tensor]],
    inputs: Inputs,
    grads: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> Results:
    """The outputs of a head, then its gradients (hidden, weight, bias) for `grads`.

    Each of `grads` is a tensor, or None where none arrives; without `grads` nothing is
    differentiated.
    """
    h, w, y, b = inputs
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    b = None if b is None else b.detach().clone().requires_grad_()
    outputs = list(function(h, w, y, bias=b, **options)[:3])
    if grads is None:
        return [x.detach() for x in outputs]
    pairs = [(x, g.to(x.dtype)) for x, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    return [*(x.detach() for x in outputs), *(x.grad for x in (h, w, b) if x is not None)]


def in_dtype(dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    """The specification in one precision, as a function of what a Head holds."""

    def function(
        h: Tensor, w: Tensor, y: Tensor, bias: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, ...]:
        bias = None if bias is None else bias.to(dtype)
        return reference.linear_logprob_entropy(Head(h.to(dtype), w.to(dtype), y, bias, **options))

    return function


def three_of(
    inputs: Inputs,
    grads: Sequence[Tensor | None] | None = None,
    orders: int = 4,
    **options: Any,
) -> tuple[Results, Results, Results]:
    """run() by the reference: in fp64, in the dtype of the inputs, and in fp32 by its worst order.

    Gradients have the dtype of their formula. An eager path in fp32 is the last.
    orders: 0 for one fp32 run by torch in place of both; GpuArithmetic has to know.
    """

    def typed(dtype: torch.dtype) -> Results:
        h, w, y, b = inputs
        upcast = h.to(dtype), w.to(dtype), y, None if b is None else b.to(dtype)
        return run(in_dtype(dtype), upcast, grads, **options)

    truth, dtype = typed(torch.float64), inputs[0].dtype
    if not orders:
        plain = typed(torch.float32)
        return truth, plain, plain
    plain = worst_of_orders(lambda: typed(torch.float32), truth, orders)
    eager = plain if dtype == torch.float32 else typed(dtype)
    return truth, eager, plain


def statistics_in(
    dtype: torch.dtype,
    h: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The statistics by the specification in one precision."""
    b = None if bias is None else bias.to(dtype)
    return reference.head_statistics(Head(h.to(dtype), w.to(dtype), y, b, **options))


def three_statistics(
    h: Tensor, w: Tensor, y: Tensor, orders: int = 8, **options: Any
) -> tuple[Sequence[Tensor | None], ...]:
    """Statistics by the reference as `three_of` has outputs."""
    truths = statistics_in(torch.float64, h, w, y, **options)
    if not orders:
        plain = statistics_in(torch.float32, h, w, y, **options)
        return truths, plain, plain
    eager = statistics_in(h.dtype, h, w, y, **options) if h.dtype != torch.float32 else None
    formula = partial(statistics_in, torch.float32, h, w, y, **options)
    worst = worst_of_orders(formula, truths, orders)
    return truths, eager or worst, worst


def check_results(
    got: Sequence[Any],
    three: tuple[Results, ...],
    arithmetic: GpuArithmetic | None,
    operands: torch.dtype = torch.float32,
) -> None:
    """Both bounds for outputs and gradients, and for low entropies by themselves too.

    operands: what the products of backward round dz to. An error begins with the op that is wrong.
    """
    truths = three[0]
    more = [torch.zeros_like(x) for x in truths]
    if arithmetic is not None:
        more = [*arithmetic.outputs(*truths[:3]), *map(arithmetic.gradient, truths[3:])]
    judged = [*zip(got, *three, more, strict=True)]
    low = truths[1] < LOW_ENTROPY
    # What high entropies err hides what low ones do.
    outputs = judged[:3]
    if low.any():
        *quartet, allowance = (x[low] for x in judged[1])
        outputs.append((*quartet, allowance + TRUTH_ERROR))
    for op, own, each in (
        ("forward", torch.float32, outputs),
        ("dlogits", operands, judged[3:]),
    ):
        try:
            for *quartet, allowance in each:
                assert_within_two_bounds(*quartet, operands=own, allowance=allowance)
        except AssertionError as error:
            raise AssertionError(f"{op}: {error}") from error


def check_statistics(
    got: Tensor | Sequence[Tensor],
    three: tuple[Sequence[Any], ...],
    arithmetic: GpuArithmetic | None,
    factor: float = 2.0,
) -> None:
    """Both bounds for each statistic of `got`, the first of _rows.STATISTICS; not for is_top1."""
    more = [0.0] * len(got) if arithmetic is None else arithmetic.statistics(*three[0])
    for one, *others, allowance in zip(got[:5], *three, more, strict=False):
        assert one.dtype == torch.float32
        assert_within_two_bounds(one, *others, factor=factor, allowance=allowance)


def check_is_top1(
    got_T: Tensor,
    h: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    support: Support | None = None,
    **options: Any,
) -> None:
    """As fp64 has it, where that tells the target's logit from its rivals' by more than rounding.

    got_T: bool, or 1 for true.
    """
    no_bias = torch.zeros_like(w[:, 0])
    b = (no_bias if bias is None else bias).double()
    head = Head(h.double(), w.double(), y, b, **options)
    valid_T = y != head.ignore_index
    column_T1 = y.where(valid_T, 0).unsqueeze(1)
    z_TV = reference._logits(head, support)
    own_T = z_TV.gather(1, column_T1).squeeze(1)
    rival_T = z_TV.scatter(1, column_T1, -torch.inf).amax(1)
    want_T = valid_T & (z_TV.argmax(1) == y)
    # Sums of products in any order, and what comes after them.
    terms_TV = h.double().abs() @ w.double().abs().T + b.abs().nan_to_num(posinf=0.0)
    scale = 1.0 if head.temperature is None else torch.as_tensor(head.temperature).to(h.device)
    most_T = terms_TV.amax(1) * head.logit_scale + (head.softcap or 0.0)
    error_T = 2 * (h.shape[1] + 8) * torch.finfo(torch.float32).eps * most_T / scale
    sure_T = ~valid_T | ((own_T - rival_T).abs() >= error_T)
    wrong_T = sure_T & ((got_T == 1) != want_T)
    assert not wrong_T.any(), f"is_top1 is wrong at rows {wrong_T.nonzero().flatten().tolist()}"


def worst_of_shuffles(
    both: Callable[..., tuple[Tensor, Tensor]],
    logprob: Tensor,
    others: Sequence[Tensor | None],
    truths: Sequence[Tensor],
    orders: int = 16,
) -> Results:
    """The loss and its gradient [B, L], each element from the worst of several orders of tokens.

    both: loss and gradient of log-probs and `others`, [B, L] or None. The terms of a loss cancel,
    so that its error in one order may be anything down to none.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(orders):
        rows, columns = (torch.randperm(n, generator=generator) for n in logprob.shape)
        x, *rest = (None if x is None else x[rows][:, columns] for x in (logprob, *others))
        loss, mixed = both(x, *rest)
        slope = torch.empty_like(mixed)
        slope[rows[:, None], columns] = mixed
        found.append([loss, slope])
    return worst_elements(found, truths)
