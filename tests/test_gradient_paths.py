"""Gradients that reach one tensor by two ways are added before they are rounded to 16 bits.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.loss_terms import kl_divergence
from entropy_kernels.testing import peaked_head
from tests.loss_cases import policy_loss
from tests.marks import nan_is_meant

T, D, V = 41, 40, 211
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@nan_is_meant
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_targets_logit_is_its_logprob_and_the_logsumexp(dtype, impl, device):
    """Whose gradients cancel but for the target's word, however likely it is."""
    h, w, y = (x.to(device) for x in peaked_head(T, D, V, dtype=DTYPES[dtype]))
    h.requires_grad_(), w.requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), impl=impl)
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
        loss, _ = policy_loss(
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


@nan_is_meant
@pytest.mark.parametrize("opposed", [False, True], ids=["random", "opposed"])
def test_a_low_rank_update_beside_the_weight(opposed, impl, device):
    """[h, h A^T] [W, B]^T: two ways to h, whose 16-bit gradients autograd adds, as of eager's.

    Also where the update takes away most of what W gives.
    """
    h, w, y = peaked_head(T, D, V)
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) / 8 for shape in ((4, D), (V, 4)))
    if opposed:
        left, size, right = torch.linalg.svd(w, full_matrices=False)
        down, up = right[:4], -left[:, :4] * size[:4]
    h, w, down, up = (x.bfloat16() for x in (h, w, down, up))

    def gradient(logprob, dtype, where="cpu"):
        leaf, *rest = (x.detach().to(where, dtype) for x in (h, w, down, up))
        leaf.requires_grad_()
        return torch.autograd.grad(logprob(leaf, *rest).sum(), leaf)[0].cpu()

    def whole(h, w, down, up):
        logp = (h @ w.T + (h @ down.T) @ up.T).log_softmax(1)
        return logp.gather(1, y[:, None])

    def ours(h, w, down, up):
        wide, tall = torch.cat([h, h @ down.T], 1), torch.cat([w, up], 1)
        return ek.linear_logprob_entropy(ek.Head(wide, tall, y.to(device)), impl=impl).logprob

    truth = gradient(whole, torch.float64)
    eager = gradient(whole, torch.bfloat16)
    got = gradient(ours, torch.bfloat16, device)
    # The rounding of h A^T, of both gradients and of their sum.
    rounding = 4 * torch.finfo(torch.bfloat16).eps / 2 * truth.abs().max()
    assert (got - truth).abs().max() < min(rounding, (eager - truth).abs().max())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k3+", "abs"])
def test_the_gradient_of_a_kl_near_its_minimum(kind):
    """1 - exp(-d) of k3, which two terms near 1 would leave with eps / d."""
    d = torch.logspace(-8, 0, 50, dtype=torch.float64)
    d = torch.cat([d, -d]).float().requires_grad_()
    (got,) = torch.autograd.grad(kl_divergence(d, torch.zeros_like(d), kind).sum(), d)
    exact = d.detach().double()
    wanted = {"k1": torch.ones_like(exact), "k3": -torch.expm1(-exact), "abs": exact.sign()}
    torch.testing.assert_close(got.double(), wanted.get(kind, exact), rtol=1e-6, atol=0)
