"""linear_logprob_entropy: the products and memory of each path, and the options that save them.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.testing import Watch
from tests.head_cases import BY_TRITON, make
from tests.marks import nan_is_meant, sampled

pytestmark = sampled(0.2)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2, 0.1])
def test_products_of_backward_fall_with_the_fraction(head, fraction, block):
    T, D, V = 200, 24, 4 * block[1] + 3
    h, w, y = make("peaked", (T, D, V), torch.float32)
    h.requires_grad_()
    w.requires_grad_()
    with Watch() as forward:
        found = head(h, w, y)
    keep = ek.top_entropy_mask(found.entropy.detach(), fraction=fraction)
    with Watch() as backward:
        (found.logprob * keep).sum().backward()
    assert forward.products == T * V * D
    assert backward.products == 3 * round(fraction * T) * V * D


def test_clipped_and_zero_advantage_rows_are_dropped_too(head, block):
    T, D, V = 64, 16, 2 * block[1] + 5
    h, w, y = make("peaked", (T, D, V), torch.float32)
    w.requires_grad_()
    found = head(h, w, y)
    advantage = torch.ones(T)
    advantage[:20] = 0
    old = found.logprob.detach().clone()
    old[20:30] -= 1.0
    loss, metrics = ek.ratio_loss(found.logprob, old, advantage, torch.ones(T, dtype=torch.bool))
    with Watch() as backward:
        loss.backward()
    assert backward.products == 2 * 34 * V * D
    assert metrics["head/active_rows"] == 34


@pytest.mark.parametrize(
    ("frozen", "products"), [("weight", 2), ("hidden", 2), ("bias", 3), ("all but bias", 1)]
)
def test_what_is_frozen_costs_nothing(head, frozen, products):
    T, D, V = 40, 16, 1031
    h, w, y = make("peaked", (T, D, V), torch.float32)
    b = torch.randn(V)
    for name, x in {"hidden": h, "weight": w, "bias": b}.items():
        x.requires_grad_(name == "bias" if frozen == "all but bias" else name != frozen)
    found = head(h, w, y, bias=b)
    with Watch() as backward:
        found.logprob.sum().backward()
    assert backward.products == products * T * V * D
    for x in (h, w, b):
        assert (x.grad is not None) == x.requires_grad


def test_no_tensor_of_tokens_times_vocabulary(head, impl, block, monkeypatch):
    if impl in BY_TRITON:
        from entropy_kernels._triton.head_backward import launch as backward

        monkeypatch.setattr(backward, "CHUNK_V", block[1] // 2)
        monkeypatch.setattr(backward, "DZ_BYTES", 0)
    T, D, V = 3 * block[0], block[1] // 32, 4 * block[1]
    h, w, y = make("uniform", (T, D, V), torch.float32)
    h.requires_grad_()
    w.requires_grad_()
    with Watch() as watch:
        found = head(h, w, y)
        (found.logprob.sum() + found.entropy.sum()).backward()
    assert watch.products == 4 * T * D * V
    assert watch.largest < T * V / 4


def test_kept_logits_save_a_product(head, block):
    vocabulary = 2 * block[1] + 5
    h, w, y = make("peaked", (50, 24, vocabulary), torch.bfloat16)
    w.requires_grad_()
    h.requires_grad_()
    grads = []
    for keep_logits, products in ((True, 2), (False, 3)):
        h.grad = w.grad = None
        found = head(h, w, y, keep_logits=keep_logits)
        with Watch() as backward:
            (found.logprob - 0.1 * found.entropy).sum().backward()
        assert backward.products == products * 50 * 24 * vocabulary
        grads.append((h.grad, w.grad))
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_logits_of_rows_above_a_threshold_may_be_kept_and_change_no_gradient(
    head, impl, block, device, as_tensor
):
    """By "triton" alone: two products of the rows above instead of three."""
    vocabulary = 2 * block[1] + 5
    h, w, y = make("peaked", (50, 24, vocabulary), torch.float32, device)
    w.requires_grad_()
    h.requires_grad_()
    entropy = head(h, w, y).entropy.detach()
    above = entropy.sort(descending=True).values[9]
    grads = []
    for options in ({"keep_logits_above": above if as_tensor else above.item()}, {}):
        h.grad = w.grad = None
        found = head(h, w, y, **options)
        with Watch() as backward:
            ((found.logprob - 0.1 * found.entropy) * (entropy >= above)).sum().backward()
        products = 2 if impl in BY_TRITON and options else 3
        assert backward.products == products * 10 * 24 * vocabulary
        grads.append((h.grad, w.grad))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-4, atol=1e-6)


@nan_is_meant
def test_ignored_rows_cost_nothing_and_never_poison(head, device):
    h, w, y = make("peaked", (60, 24, 1031), torch.float32, device)
    y[10:50] = -100
    h[10:50] = torch.nan
    h.requires_grad_()
    with Watch() as forward:
        found = head(h, w, y)
    if (head.keywords["impl"], device) == ("torch", "cuda"):
        # Their number would have to reach the host first.
        assert forward.products == 60 * 24 * 1031
    else:
        assert forward.products == 20 * 24 * 1031
    for x in found[:3]:
        assert (x[10:50] == 0).all()
        assert x.isfinite().all()
    found.logprob.sum().backward()
    assert (h.grad[10:50] == 0).all()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("bound", [20, 33, 100])
def test_a_bound_of_the_active_rows_changes_nothing(head, bound, device):
    h, w, y = make("peaked", (33, 16, 1031), torch.float32, device)
    grads = []
    for options in ({}, {"max_active_rows": bound}):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        head(x, weight, y, **options).logprob[5:25].sum().backward()
        grads.append((x.grad, weight.grad))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_more_active_rows_than_their_bound_are_never_dropped(head, impl, device):
    h, w, y = make("peaked", (33, 16, 1031), torch.float32, device)
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = head(h, w, y, max_active_rows=19).logprob[5:25].sum()
    if impl not in BY_TRITON:
        with pytest.raises(ValueError, match="max_active_rows is 19; got gradients at 20 rows"):
            loss.backward()
        return
    loss.backward()
    assert h.grad.isnan().all()
    assert w.grad.isnan().all()


def test_a_logit_scale_costs_what_its_temperature_costs(head, block):
    """c tanh(k x / c) = k (c / k) tanh(x / (c / k)): the same bits, products and memory."""
    h, w, y = make("peaked", (33, 16, block[1] + 5), torch.float32)
    results = []
    for options in ({"logit_scale": 0.5, "softcap": 5.0}, {"temperature": 2.0, "softcap": 10.0}):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        with Watch() as watch:
            found = head(x, weight, y, **options)
            (found.logprob - found.entropy).sum().backward()
        cost = torch.tensor([watch.products, watch.largest])
        results.append([*found[:3], x.grad, weight.grad, cost])
    assert all(map(torch.equal, *results))
