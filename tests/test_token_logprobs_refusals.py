"""`token_ids` that cannot be: refused by name where values are read, and NaN elsewhere."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import entropy_kernels as ek
from entropy_kernels import _rows
from entropy_kernels.testing import peaked_head
from tests.marks import nan_is_meant, sampled
from tests.token_cases import CALL_D as D
from tests.token_cases import CALL_V as V
from tests.token_cases import FORMS, T, asked_for, on, per_token

pytestmark = [sampled(0.2), nan_is_meant]


@pytest.fixture(params=FORMS)
def asked(request):
    return asked_for(request.param)


def test_more_active_rows_than_their_bound_are_refused(asked, impl, device):
    """A row whose gradients add up to nothing counts."""
    h, w, y, ids = on(device, *asked)
    w.requires_grad_()
    sign = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0], device=device)[: ids.shape[-1]]
    for most in (9, 8):
        found = ek.linear_logprob_entropy(
            ek.Head(h, w, y), token_ids=ids, max_active_rows=most, impl=impl
        )
        loss = found.logprob[:5].sum() + (found.token_logprobs * sign)[3:9].sum()
        if most == 9:
            loss.backward()
            assert w.grad.isfinite().all()
        elif device == "cuda":
            loss.backward()
            assert w.grad.isnan().any()
        else:
            with pytest.raises(ValueError, match="rows is 8; got gradients at 9 rows"):
                loss.backward()


def test_a_bound_that_nobody_checks_is_nan_beyond_it(asked, monkeypatch):
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    h, w, y, ids = asked
    for most in (9, 8):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        found = ek.linear_logprob_entropy(
            ek.Head(x, weight, y), token_ids=ids, max_active_rows=most, impl="torch"
        )
        found.token_logprobs[:9].sum().backward()
        assert x.grad.isnan().any() == weight.grad.isnan().any() == (most == 8)


@pytest.mark.parametrize("wrong", [-1, V, 2**40])
def test_what_nobody_checks_is_nan_in_its_place_and_row(wrong, asked, impl, device, monkeypatch):
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    h, w, y, ids = on(device, *asked)
    ids = per_token(ids) if ids.ndim == 1 else ids
    clean = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    ids[5, 1] = wrong
    h.requires_grad_(), w.requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    assert found.token_logprobs.isnan().nonzero().tolist() == [[5, 1]]
    assert torch.equal(found.logprob, clean.logprob)
    for rows, bad in ((torch.arange(T) != 5, []), (torch.arange(T) >= 0, [5])):
        h.grad = w.grad = None
        found.token_logprobs[rows.to(device)].sum().backward(retain_graph=True)
        assert h.grad.isnan().any(1).nonzero().flatten().tolist() == bad
        assert bool(w.grad.isnan().any()) == bool(bad)


def test_a_wrong_shared_id_that_nobody_checks_is_nan_in_its_column(impl, device, monkeypatch):
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    h, w, y = on(device, *peaked_head(T, D, V))
    ids = torch.tensor([3, V, V - 1], device=device)
    h.requires_grad_(), w.requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    assert found.token_logprobs.isnan().any(0).tolist() == [False, True, False]
    found.token_logprobs[:, ::2].sum().backward()
    assert h.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_second_derivatives_are_refused(asked, impl, device):
    h, w, y, ids = on(device, *asked)
    h.requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    (slope,) = torch.autograd.grad(found.token_logprobs.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_ids_of_a_support_are_refused(asked, unchecked_shapes):
    h, w, y, ids = asked
    support = ek.Support.of([[int(x)] for x in y])
    with pytest.raises(ValueError, match="token_ids have no meaning with a support"):
        ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, support=support)


def test_ids_of_a_divided_vocabulary_are_refused(asked):
    h, w, y, ids = asked
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(
            ValueError, match="token_ids need the whole vocabulary; got a vocab_gro"
        ):
            ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, vocab_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_an_id_out_of_range_is_named(asked, impl, device):
    if device == "cuda":
        pytest.skip("values are not read on a GPU")
    h, w, y, ids = asked
    ids = ids.clone()
    for wrong in (-1, V):
        ids[..., 1] = 0
        ids.view(-1)[-1 if ids.ndim > 1 else 1] = wrong
        where = f" at token {T - 1}" if ids.ndim > 1 else ""
        for name in (impl, "reference"):
            with pytest.raises(ValueError, match=rf"\[0, {V}\); got {wrong}{where}$"):
                ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=name)
