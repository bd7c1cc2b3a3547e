"""Gradients that reach one tensor by two ways are added before they are rounded to 16 bits.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.loss_terms import kl_divergence
from entropy_kernels.testing import peaked_head
from tests.head_cases import nan_is_meant

T, D, V = 41, 40, 211
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@nan_is_meant
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_targets_logit_is_its_logprob_and_the_logsumexp(dtype, impl, device):
    """Whose gradients cancel but for the target's word, however likely it is."""
    h, w, y = (x.to(device) for x in peaked_head(T, D, V, dtype=DTYPES[dtype]))
    h.requires_grad_(), w.requires_grad_()
    found = ek.linear_logprob_entropy(h, w, y, impl=impl)
    assert (found.logprob > -1e-3).any()
    (found.logprob + found.logsumexp).sum().backward()
    torch.testing.assert_close(h.grad, w.detach()[y], rtol=torch.finfo(h.dtype).eps, atol=1e-5)
    wanted = torch.zeros(V, D, dtype=torch.float64).index_add_(
        0, y.cpu(), h.detach().cpu().double()
    )
    eps = torch.finfo(h.dtype).eps
    torch.testing.assert_close(w.grad.cpu().double(), wanted, rtol=eps, atol=1e-4)


@nan_is_meant
@pytest.mark.parametrize("first", [True, False], ids=["row 0 selected", "row 0 not"])
def test_places_left_over_add_nothing_to_row_0(first, impl, device):
    """They point at it, and gradients of rows are summed in the dtype of the hidden states."""
    h, w, y = (x.to(device) for x in peaked_head(T, D, V, dtype=torch.bfloat16))
    selected = torch.zeros(T, dtype=torch.bool, device=device)
    selected[0 if first else 1 :: 5] = True
    everything = torch.ones_like(selected)
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(T, generator=generator).to(device)

    def gradients(most):
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        loss, _ = ek.high_entropy_policy_loss(
            *leaves,
            y,
            None,
            advantage,
            everything,
            selected=selected,
            max_active_rows=most,
            impl=impl,
        )
        return torch.autograd.grad(loss, leaves)

    for got, wanted in zip(gradients(T), gradients(None), strict=True):
        assert torch.equal(got, wanted)
        assert wanted.any()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k3+", "abs"])
def test_the_gradient_of_a_kl_near_its_minimum(kind):
    """1 - exp(-d) of k3, which two terms near 1 would leave with eps / d."""
    d = torch.logspace(-8, 0, 50, dtype=torch.float64)
    d = torch.cat([d, -d]).float().requires_grad_()
    (got,) = torch.autograd.grad(kl_divergence(d, torch.zeros_like(d), kind).sum(), d)
    exact = d.detach().double()
    wanted = {"k1": torch.ones_like(exact), "k3": -torch.expm1(-exact), "abs": exact.sign()}
    torch.testing.assert_close(got.double(), wanted.get(kind, exact), rtol=1e-6, atol=0)
