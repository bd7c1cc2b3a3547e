"""What the tests of the head share: heads of every kind, the sizes of its blocks, its truth.

T tokens, D hidden, V vocabulary.
"""

import dataclasses
import functools
import hashlib

import torch

import entropy_kernels as ek
from entropy_kernels import _rows
from entropy_kernels._bounds import GpuArithmetic
from entropy_kernels._torch import blocks
from entropy_kernels.testing import peaked_head
from entropy_kernels.verification import truth
from entropy_kernels.verification.truth import bend

BLOCK_T, BLOCK_V = blocks._SIZES["cpu"]
# The backends whose launchers are those of _triton.
BY_TRITON = ("triton", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_OPTIONS = [field.name for field in dataclasses.fields(ek.Head)]
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


three_of = remembered(truth.three_of)
three_statistics = remembered(truth.three_statistics)


def logprob_entropy(hidden, weight, target, **options):
    """linear_logprob_entropy of the Head of these; `options` are the head's and the function's."""
    of_head = {name: x for name, x in options.items() if name in HEAD_OPTIONS}
    others = {name: x for name, x in options.items() if name not in HEAD_OPTIONS}
    return ek.linear_logprob_entropy(ek.Head(hidden, weight, target, **of_head), **others)


def with_statistics(head, *tensors, **options):
    """All that `head`, of one implementation, returns: with every statistic that it fills."""
    names = _rows.filled(head.keywords["impl"])
    return [x for x in head(*tensors, statistics=names, **options) if x is not None]


def numbers(found):
    """The outputs of a head that can be NaN."""
    return [x for x in found if x is not None and x.is_floating_point()]


def make(rows: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Hidden states, weight and targets whose logits are of one kind."""
    h, w, y = bend(rows, *(x.clone() for x in _peaked_head(*shape)))
    return h.to(device, dtype), w.to(device, dtype), y.to(device)


def dtype_of_products(impl, dtype):
    """What dz is rounded to for its products, in 16 bits as eager's."""
    rounds = impl in BY_TRITON or (impl == "cpu" and dtype == torch.bfloat16)
    return dtype if rounds else torch.float32


def arithmetic_of(h, w, **options):
    """What computes this head: None where that is no GPU."""
    return GpuArithmetic.of(h, w, **options) if h.is_cuda else None


def assert_as_reference(got, inputs, grads=None, *, operands=torch.float32, **options):
    """Both bounds for outputs and gradients; the products of backward round dz to `operands`."""
    three = three_of(inputs, grads, **options)
    truth.check_results(got, three, arithmetic_of(*inputs[:2], **options), operands)


def check_statistics(got, h, w, y, factor=2.0, **options):
    """Both bounds for each statistic of `got`, in the order of _rows.STATISTICS, and is_top1."""
    three = three_statistics(h, w, y, **options)
    truth.check_statistics(got, three, arithmetic_of(h, w, **options), factor)
    truth.check_is_top1(got[5], h, w, y, **options)
