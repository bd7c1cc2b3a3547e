"""What the tests of the head share: heads of every kind, the sizes of its blocks, its truth.

T tokens, D hidden, V vocabulary.
"""

import dataclasses
import functools
import hashlib

import torch

import entropy_kernels as ek
from entropy_kernels import _rows, reference
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels._torch import blocks
from entropy_kernels.testing import peaked_head

BLOCK_T, BLOCK_V = blocks._SIZES["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_OPTIONS = [field.name for field in dataclasses.fields(ek.Head)]
ROWS = ["peaked", "uniform", "tied", "very negative", "large"]
# Results that are kept: as many as a test's cases, which each backend asks for in turn.
KEPT_RESULTS = 40
_peaked_head = functools.lru_cache(16)(peaked_head)


def remembered(function):
    """`function`, computed once for the same arguments: a truth is the same for every backend."""
    results = {}

    @functools.wraps(function)
    def found(*args, **options):
        key = _fingerprint((args, options))
        if key not in results:
            if len(results) == KEPT_RESULTS:
                del results[next(iter(results))]
            results[key] = function(*args, **options)
        return results[key]

    return found


def _fingerprint(x):
    """Equal for equal arguments alone."""
    if isinstance(x, torch.Tensor):
        values = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return x.dtype, x.shape, x.device, hashlib.sha256(values).digest()
    if isinstance(x, list | tuple):
        return tuple(map(_fingerprint, x))
    return _fingerprint(sorted(x.items())) if isinstance(x, dict) else x


def logprob_entropy(hidden, weight, target, **options):
    """linear_logprob_entropy of the Head of these; `options` are the head's and the function's."""
    of_head = {name: x for name, x in options.items() if name in HEAD_OPTIONS}
    others = {name: x for name, x in options.items() if name not in HEAD_OPTIONS}
    return ek.linear_logprob_entropy(ek.Head(hidden, weight, target, **of_head), **others)


def with_statistics(head, *tensors, **options):
    """All that `head`, of one implementation, returns: with every statistic that it fills."""
    names = _rows.filled(head.keywords["impl"])
    return [x for x in head(*tensors, statistics=names, **options) if x is not None]


def make(rows: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Hidden states, weight and targets whose logits are of one kind."""
    h, w, y = bend(rows, *(x.clone() for x in _peaked_head(*shape)))
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


def run(function, inputs, grads=None, **options):
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
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [*(x.detach() for x in outputs), *(x.grad for x in (h, w, b) if x is not None)]


def in_dtype(dtype):
    def function(h, w, y, bias=None, **options):
        bias = None if bias is None else bias.to(dtype)
        return reference.linear_logprob_entropy(
            ek.Head(h.to(dtype), w.to(dtype), y, bias, **options)
        )

    return function


@remembered
def three_of(inputs, grads=None, orders=4, **options):
    """run() by the reference: in fp64, in the dtype of the inputs, and in fp32 by its worst order.

    Gradients have the dtype of their formula. An eager path in fp32 is the last.
    """

    def typed(dtype):
        upcast = [x if x is None or x.dtype == torch.int64 else x.to(dtype) for x in inputs]
        return run(in_dtype(dtype), upcast, grads, **options)

    truth, dtype = typed(torch.float64), inputs[0].dtype
    plain = worst_of_orders(lambda: typed(torch.float32), truth, orders)
    eager = plain if dtype == torch.float32 else typed(dtype)
    return truth, eager, plain


def dtype_of_products(impl, dtype):
    """What dz is rounded to for its products, in 16 bits as eager's."""
    rounds = impl == "triton" or (impl == "cpu" and dtype == torch.bfloat16)
    return dtype if rounds else torch.float32


def assert_as_reference(got, inputs, grads=None, *, operands=torch.float32, **options):
    """Both bounds for outputs and gradients; the products of backward round dz to `operands`."""
    for number, quartet in enumerate(zip(got, *three_of(inputs, grads, **options), strict=True)):
        assert_within_two_bounds(*quartet, operands=torch.float32 if number < 3 else operands)


def statistics_in(dtype, h, w, y, *, bias=None, **options):
    b = None if bias is None else bias.to(dtype)
    return reference.head_statistics(ek.Head(h.to(dtype), w.to(dtype), y, b, **options))


def check_statistics(got, h, w, y, factor=2.0, **options):
    """Both bounds for each statistic of `got`, the first of _rows.STATISTICS."""
    three = three_statistics(h, w, y, **options)
    for one, *others in zip(got, *(x[: len(got)] for x in three), strict=True):
        assert one.dtype == torch.float32
        assert_within_two_bounds(one, *others, factor=factor)


@remembered
def three_statistics(h, w, y, **options):
    """Statistics by the reference as `three_of` has outputs."""
    truths = statistics_in(torch.float64, h, w, y, **options)
    eager = statistics_in(h.dtype, h, w, y, **options) if h.dtype != torch.float32 else None
    formula = functools.partial(statistics_in, torch.float32, h, w, y, **options)
    worst = worst_of_orders(formula, truths, orders=8)
    return truths, eager or worst, worst
