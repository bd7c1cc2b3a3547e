"""`support`: counted products and memory, forward and backward.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.testing import Watch
from tests.head_cases import make
from tests.marks import nan_is_meant, not_interpreted, sampled
from tests.support_cases import make_sets, random_sets, unsorted

pytestmark = sampled(0.2)

T, D, V = 67, 24, 40


def likely_sets(device):
    """A head whose probabilities all count in fp32, and which ids each set keeps.

    A pair whose gradient is exactly 0 costs nothing, as one of a probability of 1e-50 does not.
    """
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, D, generator=generator).to(device) / 3 for n in (T, V))
    y = torch.randint(V, (T,), generator=generator).to(device)
    return (h, w, y), random_sets(y, V)


def sizes_of(kept):
    """The ids of each set that a logit is needed for: those of sets of more than one."""
    return kept.sum(1) * (kept.sum(1) > 1)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 0.0])
def test_products_are_those_of_the_sets_and_fall_with_the_fraction(head, fraction, device):
    (h, w, y), kept = likely_sets(device)
    h.requires_grad_(), w.requires_grad_()
    sizes = sizes_of(kept)
    with Watch() as forward:
        found = head(h, w, y, support=unsorted(kept))
    assert forward.products == int(sizes.sum()) * D
    active = torch.rand(T, device=device) < fraction
    with Watch() as backward:
        (found.logprob * active).sum().backward()
    assert backward.products == 2 * int(sizes[active].sum()) * D
    assert torch.equal(h.grad.any(1), active & (sizes > 0))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_nothing(head, frozen, device):
    (h, w, y), kept = likely_sets(device)
    (w if frozen == "hidden" else h).requires_grad_()
    found = head(h, w, y, support=unsorted(kept))
    with Watch() as backward:
        found.logprob.sum().backward()
    assert backward.products == int(sizes_of(kept).sum()) * D


@nan_is_meant
def test_ignored_rows_cost_nothing_and_never_poison(head, device):
    (h, w, y), kept = likely_sets(device)
    y[10:50] = -100
    h[10:50] = torch.nan
    h.requires_grad_(), w.requires_grad_()
    with Watch() as watch:
        found = head(h, w, y, support=unsorted(kept))
        (found.logprob + found.entropy).sum().backward()
    sizes = sizes_of(kept)
    assert watch.products == 3 * int(sizes[:10].sum() + sizes[50:].sum()) * D
    for x in (*found[:2], h.grad):
        assert not x[10:50].any()
        assert x.isfinite().all()
    assert w.grad.isfinite().all()


def test_a_loss_costs_its_sets_whatever_way_its_tokens_are_chosen(impl, device):
    """1 + 2f of the sets by the entropies of now, 3f where the tokens are known."""
    (h, w, y), kept = likely_sets(device)
    support, mask = unsorted(kept), torch.rand(T, device=device) < 0.8
    head = ek.Head(h.requires_grad_(), w.requires_grad_(), y)
    entropy = ek.linear_logprob_entropy(head, support=support).entropy.detach()
    selected = ek.top_entropy_mask(entropy, mask, 0.3)
    sizes = sizes_of(kept)
    all_of_them, few = int(sizes[mask].sum()), int(sizes[selected].sum())
    ways = {
        "fraction": ({"fraction": 0.3}, all_of_them + 2 * few),
        "threshold": ({"threshold": entropy[selected].min()}, all_of_them + 2 * few),
        "selected": ({"selected": selected}, 3 * few),
    }
    for name, (options, products) in ways.items():
        for most in (None, int(selected.sum()) + 3):
            backend = ek.Backend(impl, max_active_rows=most)
            with Watch() as watch:
                loss, _ = ek.high_entropy_policy_loss(
                    *(head, None, torch.ones(T, device=device), mask),
                    **options,
                    support=support,
                    backend=backend,
                )
                loss.backward()
            assert watch.products == products * D, name


@not_interpreted
def test_memory_is_that_of_the_pairs(head, impl, device):
    """Neither [T, V] nor rows gathered for each pair: a few numbers per pair, and blocks."""
    T, D, V = 2000, 64, 5000
    h, w, y = make("uniform", (T, D, V), torch.float32, device)
    kept = random_sets(y, V) & (torch.rand(T, V, device=device) < 0.03)
    kept[torch.arange(T), y] = True
    pairs = int(kept.sum())
    main_grad = torch.zeros_like(w)
    w.requires_grad_()
    with Watch() as watch:
        found = head(h, w, y, support=unsorted(kept), main_grad=main_grad)
        (found.logprob + found.entropy).sum().backward()
    # The torch path gathers 2^18 numbers at a time; the weight and the hidden states were there.
    blocks = 1 << 18 if impl == "torch" else 0
    assert watch.largest <= max(2 * (pairs + 1), blocks, T * D, V * D)
    assert watch.largest < min(T * V, pairs * D) / 8


@pytest.mark.parametrize("bound", [20, 33, 100])
def test_a_bound_of_the_active_rows_changes_nothing(head, bound, device):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    grads = []
    for options in ({}, {"max_active_rows": bound}):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        head(x, weight, y, support=unsorted(kept), **options).logprob[5:25].sum().backward()
        grads.append((x.grad, weight.grad))
    assert all(map(torch.equal, *grads))


def test_more_active_rows_than_their_bound_are_refused(head, device):
    """Sets of one, which have no gradient, do not count."""
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    w.requires_grad_()
    rows = int((sizes_of(kept)[5:25] > 0).sum())
    assert 1 < rows < 20
    for most in (rows, rows - 1):
        loss = head(h, w, y, support=unsorted(kept), max_active_rows=most).logprob[5:25].sum()
        if most == rows:
            loss.backward()
            assert w.grad.isfinite().all()
        elif device == "cuda":
            loss.backward()
            assert w.grad.isnan().any()
        else:
            with pytest.raises(ValueError, match=f"rows is {most}; got gradients at {rows} rows"):
                loss.backward()
