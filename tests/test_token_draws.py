"""Tokens drawn at random: their weights leave sums over all tokens unbiased."""

import pytest
import torch

from entropy_kernels import token_rules
from tests.loss_cases import gradient, make_case, ratio_loss


def drawn_with(monkeypatch, u, call):
    """What `call` returns where torch.rand gives `u`."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: u)
    return call()


def test_each_token_is_drawn_with_its_probability_and_weighs_its_inverse():
    mask = torch.tensor([True, True, False, True]).expand(40_000, 4)
    for fraction in (0.2, 0.5, 1.0):
        g = torch.Generator().manual_seed(0)
        selected, weight = token_rules.random_tokens(mask, fraction, generator=g)
        assert not selected[~mask].any()
        assert torch.equal(weight > 0, selected)
        assert (weight[selected] == torch.tensor(1.0) / fraction).all()
        share = selected[mask].float().mean()
        # Five standard deviations of 120,000 draws.
        assert abs(float(share) - fraction) <= 5 * (fraction * (1 - fraction) / 120_000) ** 0.5
        # Independent: two tokens of a row together as often as by chance.
        both = float((selected[:, 0] & selected[:, 1]).float().mean())
        assert abs(both - fraction**2) <= 5 * (0.25 / 40_000) ** 0.5


@pytest.mark.parametrize(("fraction", "least"), [(0.5, 1), (0.2, 1), (0.75, 1), (0.4, 3), (1.0, 1)])
def test_the_weighted_sum_over_random_prefixes_is_that_over_all(monkeypatch, fraction, least):
    """Its mean over a fine grid of u, the only random number, whatever the tokens' numbers."""
    count, n = 200_000, 7
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, [2, 8]] = False  # a token between that does not count, and padding
    mask = mask.expand(count, 9)
    kept, weight = drawn_with(
        monkeypatch, u, lambda: token_rules.random_prefixes(mask, fraction, least=least)
    )
    assert torch.equal(weight > 0, kept)
    assert not kept[~mask].any()
    # A prefix: the kept tokens of the mask come before those that are not.
    inside = kept[:, mask[0]].int()
    assert (inside.diff(dim=1) <= 0).all()
    assert (inside.sum(1) >= least).all()
    p = [1 - (t / n) ** (fraction / (1 - fraction)) if fraction < 1 else 1.0 for t in range(n)]
    p[:least] = [1.0] * least
    torch.testing.assert_close(
        inside.double().mean(0), torch.tensor(p, dtype=torch.float64), rtol=0, atol=2e-5
    )
    value = torch.linspace(-1, 2, n, dtype=torch.float64) ** 3
    mean = (weight[:, mask[0]].double() * value).sum(1).mean()
    torch.testing.assert_close(mean, value.sum(), rtol=1e-4, atol=1e-4)
    assert inside.sum(1).double().mean() >= fraction * n - 1e-3


def test_at_one_half_every_length_is_as_likely():
    mask = torch.ones(50_000, 5, dtype=torch.bool)
    g = torch.Generator().manual_seed(3)
    kept, weight = token_rules.random_prefixes(mask, generator=g)
    lengths = kept.sum(1).bincount(minlength=6)
    assert lengths[0] == 0
    assert ((lengths[1:] - 10_000).abs() < 5 * (50_000 * 0.2 * 0.8) ** 0.5).all()
    full = weight[kept.all(1)][0]
    torch.testing.assert_close(full, 1 / torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_prefixes_of_sequences_one_after_the_other_are_those_of_rows(fraction):
    lengths = torch.tensor([9, 0, 4, 1, 7])
    there = torch.arange(9) < lengths[:, None]
    mask = there & (torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.8)
    for seed in range(5):
        rows = token_rules.random_prefixes(
            mask, fraction, generator=torch.Generator().manual_seed(seed)
        )
        ragged = token_rules.random_prefixes(
            mask[there], fraction, lengths=lengths, generator=torch.Generator().manual_seed(seed)
        )
        for got, want in zip(ragged, rows, strict=True):
            assert torch.equal(got, want[there])


def test_nothing_is_drawn_of_nothing():
    for shape in ((0, 4), (2, 0), (2, 3)):
        mask = torch.zeros(shape, dtype=torch.bool)
        for rule in (token_rules.random_tokens, token_rules.random_prefixes):
            selected, weight = rule(mask)
            assert not selected.any()
            assert not weight.any()
            assert selected.shape == weight.shape == mask.shape


@pytest.mark.parametrize("rule", [token_rules.random_tokens, token_rules.random_prefixes])
def test_the_gradient_of_the_loss_is_unbiased(rule):
    """The mean over many draws is the gradient on all tokens, and the count of all divides it."""
    case, count, total, squares = make_case(), 400, 0.0, 0.0

    def slope(selected, weight):
        given = case.old, case.advantage, case.mask
        options = {"selected": selected, "denominator": "all", "token_weight": weight}
        return gradient(case.logprob, lambda x: ratio_loss(x, *given, **options)[0])[1]

    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        drawn, weight = rule(case.mask, 0.5, generator=g)
        one = slope(drawn, weight.double())
        total, squares = total + one, squares + one.square()
    mean = total / count
    error = ((squares / count - mean.square()).clamp_min(0) / count).sqrt()
    want = slope(case.mask, None)
    assert (want != 0).sum() > 15
    assert ((mean - want).abs() <= 5 * error + 1e-6).all()
