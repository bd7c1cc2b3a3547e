"""Models of the arithmetic that GPUs have and fp32 has not, for Triton's interpreter.

Tensor cores add some products of 16-bit numbers at once (arXiv 2512.07004): aligned to the largest
exponent among them and the accumulator, cut to 24 bits and a few more, summed, and cut to 24 bits.
ex2.approx and div.full err by up to 2 units of the last place (PTX ISA).
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from entropy_kernels._triton.common import products


class TensorCore(NamedTuple):
    """terms: products that are added at once. extra: bits that are kept beyond 24; None for all."""

    terms: int
    extra: int | None


TENSOR_CORES = {
    "cut sums": TensorCore(16, None),
    "Ampere": TensorCore(8, 1),
    "Hopper": TensorCore(16, 2),
}
ULPS = 2


def multiply(left: np.ndarray, right: np.ndarray, acc: np.ndarray, core: TensorCore) -> np.ndarray:
    """acc + left @ right, fp32, in the order of the depth."""
    total, left, right = (x.astype(np.float64) for x in (acc, left, right))
    for start in range(0, left.shape[1], core.terms):
        a, b = left[:, start : start + core.terms], right[start : start + core.terms]
        if core.extra is None:
            total = _cut(total + a @ b)
            continue
        terms = np.empty((1 + a.shape[1], *total.shape))
        terms[0] = total
        np.multiply(a.T[:, :, None], b[:, None], out=terms[1:])
        bits = 24 + core.extra - np.frexp(np.maximum(terms.max(0), -terms.min(0)))[1]
        terms *= np.ldexp(1.0, bits)
        total = _cut(np.ldexp(np.trunc(terms, out=terms).sum(0), -bits))
    return total.astype(np.float32)


def chain(left: np.ndarray, right: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + left @ right by one FMA per term: what fp32 operands get."""
    total, left, right = acc, left.astype(np.float64), right.astype(np.float64)
    for k in range(left.shape[1]):
        total = (total + left[:, k, None] * right[k]).astype(np.float32)
    return total


def _cut(x: np.ndarray) -> np.ndarray:
    """fp64 to the next fp32 toward zero, as fp64."""
    near = x.astype(np.float32)
    far = np.abs(near.astype(np.float64)) > np.abs(x)
    return np.where(far, np.nextafter(near, np.float32(0)), near).astype(np.float64)


def inexact(result: np.ndarray) -> np.ndarray:
    """fp32, each off by -2 to 2 units of the last place; equal ones alike, and a 1 exact."""
    bits = np.atleast_1d(np.asarray(result, np.float32)).view(np.uint32)
    off = (bits * np.uint32(2654435761) >> np.uint32(16)) % np.uint32(2 * ULPS + 1)
    moved = (bits + off - np.uint32(ULPS)).view(np.float32).reshape(np.shape(result))
    return np.where(np.isfinite(result) & (np.abs(result) > 1e-30) & (result != 1), moved, result)


@contextlib.contextmanager
def hardware(core: TensorCore | None) -> Iterator[None]:
    """Kernels in the interpreter, and the products beside them, compute as a GPU does.

    core: multiplies; None for the FMA of fp32.
    """

    def product(left, right, acc):
        return chain(left, right, acc) if core is None else multiply(left, right, acc, core)

    def create_dot(self, a, b, d, *options):
        return TensorHandle(product(a.data, b.data, d.data), d.dtype.scalar)

    def create_exp2(self, x):
        return TensorHandle(inexact(np.exp2(x.data)), x.dtype.scalar)

    def create_fdiv(self, a, b):
        found = np.divide(a.data, b.data)
        return TensorHandle(inexact(found) if found.dtype == np.float32 else found, a.dtype.scalar)

    def mm(left, right, out):
        left, right = (x.float().numpy() for x in (left, right))
        zeros = np.zeros((left.shape[0], right.shape[1]), np.float32)
        out.copy_(torch.from_numpy(product(left, right, zeros)))

    def bmm(left, right, out):
        for each in zip(left, right, out, strict=True):
            mm(*each)

    builder = {"create_dot": create_dot, "create_exp2": create_exp2, "create_fdiv": create_fdiv}
    with (
        mock.patch.multiple(InterpreterBuilder, **builder),
        mock.patch.multiple(products, mm=mm, bmm=bmm),
    ):
        yield
