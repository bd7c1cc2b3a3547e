"""The entropy bonus of the losses: its tokens, its gradient, its coefficient and its metrics."""

import pytest
import torch

from tests.loss_cases import gradient, make_case
from tests.test_loss_terms import assert_gradients_equal, loss_of


@pytest.fixture(params=[0, 1])
def case(request):
    return make_case(request.param)


def test_a_nan_of_the_entropy_bonus_is_in_the_loss_and_in_the_gradient(case):
    entropy = torch.rand_like(case.logprob)
    entropy[0, 1] = torch.nan
    loss, grad = gradient(
        entropy,
        lambda x: case.both(entropy=x, entropy_coef=0.01, selected=None)[0],
    )
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("on", ["selected", "all"])
def test_the_entropy_bonus_is_on_its_tokens(case, on):
    entropy = torch.rand(case.mask.shape, dtype=torch.float64)
    kept = case.mask & case.selected
    tokens = kept if on == "selected" else case.mask
    dirty = entropy.masked_fill(~tokens, torch.nan).requires_grad_()
    loss = loss_of(case, entropy=dirty, entropy_coef=0.1, entropy_on=on)(case.logprob)
    want = loss_of(case)(case.logprob) - 0.1 * entropy[tokens].mean()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    loss.backward()
    want = torch.where(tokens, -0.1 / tokens.sum().double(), 0.0)
    torch.testing.assert_close(dirty.grad, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("on", ["selected", "all"])
@pytest.mark.parametrize("coef", [0.2, -0.2, torch.tensor(0.2), torch.tensor([-0.2]).double()])
def test_the_bonus_says_its_coefficient_and_the_mean_entropy(case, on, coef):
    entropy = torch.rand(case.mask.shape, dtype=torch.float64)
    tokens = case.mask & case.selected if on == "selected" else case.mask
    found = case.both(entropy=entropy, entropy_coef=coef, entropy_on=on)[1]
    names = ("entropy/of_bonus", "entropy/coefficient", "entropy/bonus")
    mean, number = float(entropy[tokens].mean()), float(coef)
    assert [float(found[n]) for n in names] == pytest.approx([mean, number, number * mean])
    without = case.both(entropy=entropy)[1]
    assert not set(names) & set(without)


def test_a_tensor_is_a_coefficient_as_a_number_is_and_gets_no_gradient(case):
    entropy = torch.rand_like(case.logprob)
    coef = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def grad(coef):
        return gradient(entropy, lambda x: case.both(entropy=x, entropy_coef=coef)[0])

    assert_gradients_equal(grad(coef), grad(0.3))
    assert coef.grad is None
    assert (grad(torch.zeros(()))[1] == 0).all()
