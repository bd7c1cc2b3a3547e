"""The bounds themselves: what is right passes by any order of its sums, what is wrong does not.

T tokens, D hidden, V vocabulary.
"""

import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from entropy_kernels._bounds import GpuArithmetic, OtherOrder, worst_of_orders
from entropy_kernels.verification.truth import ROWS
from tests import head_cases
from tests.head_cases import DTYPES, make
from tests.test_linear_logprob_entropy import check

SHAPE = (67, 40, 2055)
# 16-bit operands have no bit that TF32 cuts.
FAULTS = [("TF32", torch.float32)] + [
    (fault, dtype)
    for dtype in DTYPES
    for fault in (
        "dz rounded",
        "cancelling entropy",
        "a column too many",
        "a column too few",
        "sum not rescaled",
        "16-bit accumulator",
        "16-bit logits",
    )
]
OPTIONS = {"softcap": 5.0, "ignore_index": -1}


@pytest.fixture(params=["processor", "GPU", "first use"])
def arithmetic(request, monkeypatch):
    """The same is right and wrong with the allowance for a GPU, and beside one fp32 run."""
    if request.param == "processor":
        return
    several = request.param == "GPU"
    of = functools.partial(GpuArithmetic.of, emulated=several)
    monkeypatch.setattr(head_cases, "arithmetic_of", of)
    if not several:
        three = head_cases.three_of
        one = {"orders": 0}
        monkeypatch.setattr(head_cases, "three_of", lambda *x, **more: three(*x, **more | one))


arithmetics = pytest.mark.usefixtures("arithmetic")
# This formula is not the kernels', whose right ones pass beside one run: test_hardware_model.py.
several_orders = pytest.mark.parametrize("arithmetic", ["processor", "GPU"], indirect=True)


def tf32(x):
    """Ten bits of the significand, the rest cut off."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def in_halves(h, w):
    """An accumulator of 16 bits."""
    z = torch.zeros(h.shape[0], w.shape[0])
    for d in range(h.shape[1]):
        z = (z + h[:, d : d + 1] * w[:, d]).half().float()
    return z


def logits(h, w, fault):
    if fault == "TF32":
        return tf32(h.detach()) @ tf32(w.detach()).T + (h @ w.T - (h @ w.T).detach())
    if fault == "16-bit accumulator":
        return in_halves(h.detach(), w.detach()) + (h @ w.T - (h @ w.T).detach())
    return h @ w.T


def wrong_head(
    h, w, y, bias=None, *, fault, impl, temperature=1.0, softcap=None, ignore_index=-100
):
    """The formula in fp32 with a fault, or without one where `fault` is empty."""
    z = logits(h.float(), w.float(), fault)
    if bias is not None and fault != "no bias":
        z = z + bias.float()
    if softcap is not None:
        capped = softcap * torch.tanh(z / softcap)
        z = z + (capped - z).detach() if fault == "no slope of the softcap" else capped
    temperature = torch.as_tensor(temperature).reshape(-1, 1)
    z = z / temperature
    if fault == "16-bit logits":
        z = z + (z.to(h.dtype if h.dtype != torch.float32 else torch.half).float() - z).detach()
    if fault == "dz rounded":
        z.register_hook(lambda g: g.bfloat16().float())
    all_z = z
    if fault == "a column too many":
        all_z = torch.cat([z, torch.zeros(len(z), 1)], 1)
    elif fault == "a column too few":
        all_z = z[:, :-1]
    top = all_z.detach().amax(1, keepdim=True)
    d = all_z - top
    e = d.exp()
    s = e.sum(1)
    if fault == "sum not rescaled":
        half = all_z.shape[1] // 2
        first = all_z[:, :half]
        s = (first - first.detach().amax(1, keepdim=True)).exp().sum(1) + e[:, half:].sum(1)
    log_s = s.log()
    entropy = log_s - (e * d).sum(1) / s
    if fault == "cancelling entropy":
        entropy = (top[:, 0] + log_s) - (e * all_z).sum(1) / s
    elif fault == "temperature twice":
        logp = (all_z / temperature).log_softmax(1)
        entropy = -(logp.exp() * logp).sum(1)
    ignored = y == ignore_index
    target = z.gather(1, y.masked_fill(ignored, 0)[:, None])[:, 0]
    found = target - top[:, 0] - log_s, entropy, top[:, 0] + log_s
    kept = found if fault == "ignored rows" else [x.masked_fill(ignored, 0) for x in found]
    return [x.to(torch.float32) for x in kept]


def checked(fault, dtype, rows="peaked", shape=SHAPE, order=None, **options):
    torch.manual_seed(0)
    h, w, y = make(rows, shape, dtype)
    bias = None
    if options:
        bias = torch.randn(len(w)).to(dtype)
        options["temperature"] = torch.rand(len(y)) + 0.5
        y[::3] = options["ignore_index"]

    def head(*args, **more):
        with nullcontext() if order is None else OtherOrder(order):
            return wrong_head(*args, fault=fault, **more)

    check(functools.partial(head, impl="torch"), (h, w, y, bias), "cpu", **options)


@several_orders
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_right_formula_passes_by_any_order(dtype, options, arithmetic):
    checked("", dtype, **options)
    for seed in (0, 101, 102):
        checked("", dtype, order=seed, **options)


@several_orders
@pytest.mark.parametrize("rows", ROWS)
def test_the_right_formula_passes_with_rows_of_every_kind(rows, arithmetic):
    checked("", torch.float32, rows)


@arithmetics
@pytest.mark.parametrize("shape", [SHAPE, (31, 37, 1021), (67, 40, 519), (31, 1024, 521)], ids=str)
@pytest.mark.parametrize(("fault", "dtype"), FAULTS, ids=str)
def test_a_wrong_formula_is_refused(fault, dtype, shape):
    with pytest.raises(AssertionError, match="exceeds"):
        checked(fault, dtype, shape=shape)


@arithmetics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fault", ["no bias", "temperature twice", "no slope of the softcap", "ignored rows"]
)
def test_a_forgotten_option_is_refused(fault, dtype):
    with pytest.raises(AssertionError, match="exceeds"):
        checked(fault, dtype, **OPTIONS)


def test_an_order_is_one_accumulators_on_every_processor():
    """To the bit a loop in fp32."""
    left, right = torch.randn(5, 40), torch.randn(40, 7)
    with OtherOrder(0):
        product, total = left @ right, left.sum(1)
    loop, row = np.zeros((5, 7), np.float32), np.zeros(5, np.float32)
    for a, b in zip(left.T.numpy(), right.numpy(), strict=True):
        loop += a[:, None] * b
        row += a
    assert np.array_equal(product.numpy(), loop)
    assert np.array_equal(total.numpy(), row)


def test_orders_differ_and_each_element_is_its_worst():
    left, right = torch.randn(5, 300), torch.randn(300, 7)
    truths = [left.double() @ right.double(), left.double().sum(1)]
    every = [worst_of_orders(lambda: [left @ right, left.sum(1)], truths, n) for n in range(1, 9)]
    for got, truth in zip(zip(*every, strict=True), truths, strict=True):
        errors = torch.stack([(x - truth).abs() for x in got])
        assert (errors.diff(dim=0) >= 0).all()
        assert 0 < errors[0].sum() < errors[-1].sum()
    assert worst_of_orders(lambda: [None], [None]) == [None]
