"""Products by torch where it has no fp32 products of 16-bit matrices, and where it adds to them.

M rows, K depth, N columns.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from entropy_kernels import device
from entropy_kernels._torch import blocks
from entropy_kernels._triton.common import products
from entropy_kernels._triton.head_backward import launch
from entropy_kernels.testing import Watch

M, K, N = 37, 64, 51


@pytest.fixture
def asked_again():
    """What torch can do on a device is remembered, but not from one test to another."""
    for question in (device.widens, device.adds_products):
        question.cache_clear()
    yield
    for question in (device.widens, device.adds_products):
        question.cache_clear()


@pytest.fixture(params=["mm", "bmm"])
def refused(request, monkeypatch, asked_again):
    """torch on a GPU as on ROCm: one of its products takes no out_dtype."""
    runs = getattr(torch, request.param)

    def refuses(*matrices, out_dtype=None, **options):
        if out_dtype is not None:
            raise RuntimeError("out_dtype is not supported for ROCm")
        return runs(*matrices, **options)

    monkeypatch.setattr(torch, request.param, refuses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_upcast_where_torch_refuses_fp32_ones(refused, dtype):
    with FakeTensorMode():
        left, right = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((M, K), (K, N)))
        products.bmm(left.unsqueeze(0), right.unsqueeze(0), torch.empty(1, M, N, device="cuda"))
        for out_dtype in (dtype, torch.float32):
            products.mm(left, right, torch.empty(M, N, dtype=out_dtype, device="cuda"))
        found = blocks.product(*map(blocks.compute_dtype, (left, right)))
    assert found.dtype == torch.float32
    assert found.shape == (M, N)


def test_products_of_16_bits_stay_where_torch_returns_fp32(asked_again):
    with FakeTensorMode():
        left = torch.empty(M, K, dtype=torch.bfloat16, device="cuda")
        assert blocks.compute_dtype(left).dtype == torch.bfloat16
        with Watch() as watch:
            products.mm(left, left.T, torch.empty(M, M, device="cuda"))
    assert watch.products == M * K * M
    assert not device.widens(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upcast_products_take_bounded_memory(out_dtype, monkeypatch):
    monkeypatch.setattr(products, "UPCAST_BYTES", 4 * K * 10)
    left, right = torch.randn(2, M, K).bfloat16(), torch.randn(2, K, N).bfloat16()
    out = torch.full((2, M, N), torch.nan, dtype=out_dtype)
    first = left[0], right[0], out[0]
    with Watch() as watch:
        products.mm(*first)
    assert watch.largest == 10 * K
    assert watch.products == M * K * N
    products.bmm(left, right, out)
    torch.testing.assert_close(out, torch.bmm(left.float(), right.float()).to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_it", [True, False], ids=["adds", "cannot add"])
def test_a_product_is_added_to_fp32_in_one_pass_where_torch_can(dtype, has_it, monkeypatch):
    """Else its fp32 rows are staged: they are written, read again and added."""
    adds, added = torch.addmm, []

    def addmm(total, left, right, *, out, **options):
        assert options == ({} if dtype == torch.float32 else {"out_dtype": torch.float32})
        added.append(out)
        return adds(total, left.float(), right.float(), out=out)

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(device, "adds_products", lambda *on: has_it)
    dz, hidden = torch.randn(K, N).to(dtype), torch.randn(K, 8).to(dtype)
    total = torch.randn(N, 8)
    want = total.double() + dz.T.double() @ hidden.double()
    launch._add_weight_gradient(dz, hidden, total)
    torch.testing.assert_close(total, want.float(), rtol=1e-5, atol=1e-5)
    assert len(added) == has_it
    rounded = torch.zeros(N, 8, dtype=torch.bfloat16)
    assert not products.add_mm(dz.T, hidden, rounded)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_what_a_launch_without_memory_would_multiply_is_not_counted(where):
    rows = torch.full((1,), 3, dtype=torch.int32, device=where)
    with Watch() as watch:
        products.count(rows, 7)
    assert watch.products == (0 if where == "meta" else 21)


def test_launches_before_fake_tensors_are_counted_among_them():
    with Watch() as watch:
        products.count(torch.full((1,), 3, dtype=torch.int32), 7)
        with FakeTensorMode(), Watch() as inner:
            pass
    assert (watch.products, inner.products) == (21, 0)
