"""What the tests of the head share: heads of every kind, the sizes of its blocks, its truth.

T tokens, D hidden, V vocabulary.
"""

import functools

import torch

import entropy_kernels as ek
from entropy_kernels import reference
from entropy_kernels._torch import blocks
from entropy_kernels.testing import assert_within_two_bounds, peaked_head, worst_of_orders

BLOCK_T, BLOCK_V = blocks._SIZES["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = ["peaked", "uniform", "tied", "very negative", "large"]


def make(rows: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Hidden states, weight and targets whose logits are of one kind."""
    h, w, y = bend(rows, *peaked_head(*shape))
    return h.to(device, dtype), w.to(device, dtype), y.to(device)


def bend(rows: str, h, w, y):
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


def run(function, inputs, grads, **options):
    """Outputs and gradients (hidden, weight, bias) of a head."""
    h, w, y, b = inputs
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    b = None if b is None else b.detach().clone().requires_grad_()
    outputs = list(function(h, w, y, bias=b, **options)[:3])
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [o.detach() for o in outputs], [x.grad for x in (h, w, b) if x is not None]


def in_dtype(dtype):
    def function(h, w, y, bias=None, **options):
        bias = None if bias is None else bias.to(dtype)
        return reference.linear_logprob_entropy(
            ek.Head(h.to(dtype), w.to(dtype), y, bias, **options)
        )

    return function


def three_of(inputs, grads, orders=4, **options):
    """run() by the reference: in fp64, in the dtype of the inputs, and in fp32 by its worst order.

    Gradients have the dtype of their formula. An eager path in fp32 is the last.
    """

    def typed(dtype):
        upcast = [x if x is None or x.dtype == torch.int64 else x.to(dtype) for x in inputs]
        outputs, gradients = run(in_dtype(dtype), upcast, grads, **options)
        return [*outputs, *gradients]

    truth, dtype = typed(torch.float64), inputs[0].dtype
    plain = worst_of_orders(lambda: typed(torch.float32), truth, orders)
    eager = plain if dtype == torch.float32 else typed(dtype)
    return [(found[:3], found[3:]) for found in (truth, eager, plain)]


def statistics_in(dtype, h, w, y, *, bias=None, **options):
    b = None if bias is None else bias.to(dtype)
    return reference.head_statistics(ek.Head(h.to(dtype), w.to(dtype), y, b, **options))


def check_statistics(got, h, w, y, factor=2.0, **options):
    """Both bounds for each statistic of `got`."""
    truths = statistics_in(torch.float64, h, w, y, **options)
    eager = statistics_in(h.dtype, h, w, y, **options) if h.dtype != torch.float32 else None
    formula = functools.partial(statistics_in, torch.float32, h, w, y, **options)
    worst = worst_of_orders(formula, truths, orders=8)
    for one, *three in zip(got, truths, eager or worst, worst, strict=True):
        assert one.dtype == torch.float32
        assert_within_two_bounds(one, *three, factor=factor)
