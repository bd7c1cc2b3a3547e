"""Rules beyond the top entropies: against their written definitions, in fp64."""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import token_rules
from tests.loss_cases import gradient, make_case, ratio_loss

T, V = 40, 13


@pytest.fixture
def case():
    return make_case()


@pytest.fixture
def tokens():
    """logits, target, logprob, entropy, max_prob, sum_p2, sum_p2_logp of each token."""
    logits = 2 * torch.randn(T, V, dtype=torch.float64)
    logp = logits.log_softmax(1)
    p = logp.exp()
    target = torch.multinomial(p, 1).squeeze(1)
    logprob = logp.gather(1, target[:, None]).squeeze(1)
    sums = -(p * logp).sum(1), p.amax(1), (p**2).sum(1), (p**2 * logp).sum(1)
    return logits, target, logprob, *sums


def test_covariance_is_about_the_means_of_the_mask(case):
    a, x = case.advantage[case.mask], case.logprob[case.mask]
    dirty = [v.masked_fill(~case.mask, torch.nan) for v in (case.logprob, case.advantage)]
    got = token_rules.covariance(*dirty, case.mask)
    torch.testing.assert_close(got[case.mask], (a - a.mean()) * (x - x.mean()))
    assert (got[~case.mask] == 0).all()
    got = token_rules.covariance(case.logprob, case.advantage_B, case.mask)
    want = token_rules.covariance(case.logprob, case.advantage_B[:, None].expand(6, 9), case.mask)
    assert torch.equal(got, want)


def test_clip_cov_drops_so_many_of_the_right_ones(case):
    score = token_rules.covariance(case.logprob, case.advantage, case.mask)
    clipped = torch.rand(case.mask.shape) < 0.3
    right = case.mask & (score > 0.05) & (score < 2.0) & ~clipped
    assert right.sum() > 4
    drawn = set()
    for seed in range(20):
        keep = token_rules.clip_cov(
            case.logprob,
            case.advantage,
            case.mask,
            fraction=0.1,
            low=0.05,
            high=2.0,
            clipped=clipped,
            generator=torch.Generator().manual_seed(seed),
        )
        dropped = case.mask & ~keep
        assert (dropped & ~right).sum() == 0
        assert dropped.sum() == 3  # floor(0.1 * 30)
        assert not (keep & ~case.mask).any()
        drawn |= set(dropped.flatten().nonzero().squeeze(1).tolist())
    assert len(drawn) > 4
    assert torch.equal(token_rules.clip_cov(case.logprob, case.advantage * 0, case.mask), case.mask)


def test_kl_cov_takes_the_largest(case):
    for fraction, count in ((2e-4, 1), (0.1, 3), (1.0, 30)):
        got = token_rules.kl_cov(case.logprob, case.advantage, case.mask, fraction=fraction)
        score = token_rules.covariance(case.logprob, case.advantage, case.mask)[case.mask]
        assert torch.equal(got[case.mask], score >= score.topk(count).values[-1])
        assert not (got & ~case.mask).any()
    nothing = torch.zeros_like(case.mask)
    assert not token_rules.kl_cov(case.logprob, case.advantage, nothing).any()


def test_entropy_shaped_advantages_keep_their_sign():
    entropy = torch.tensor([[0.0, 1.0, 10.0]]).requires_grad_()
    for a, want in ((2.0, [2.0, 2.4, 3.0]), (-2.0, [-2.0, -1.6, -1.0]), (0.0, [0.0, 0.0, 0.0])):
        got = token_rules.entropy_advantage(torch.tensor([a]), entropy)
        torch.testing.assert_close(got, torch.tensor([want]))
        assert not got.requires_grad


def test_two_clip_ranges():
    high = torch.tensor([True, False])
    clip_low, clip_high = token_rules.two_clip_ranges(high, low=(0.1, 0.2), high=(0.5, 0.6))
    torch.testing.assert_close(clip_low, torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(clip_high, torch.tensor([0.6, 0.2]))


def test_select_token_is_its_two_conditions(tokens):
    logits, target, logprob, _, max_prob, sum_p2, _ = tokens
    mask = torch.rand(T) < 0.8
    got = token_rules.select_token(logprob, max_prob, sum_p2, mask)
    for t in range(T):
        p = logits[t].softmax(0)
        want = bool(mask[t]) and float(p.max()) < 0.5 and p[target[t]] > (p * p).sum()
        assert bool(got[t]) == bool(want)
    assert 0 < got.sum() < mask.sum()


def test_the_discriminators_are_the_change_of_entropy(tokens):
    """dH of a step on the sampled logit is -S; of a policy gradient step -A (S - E[S])."""
    logits, target, logprob, entropy, _, sum_p2, sum_p2_logp = tokens
    x = logits.clone().requires_grad_()
    logp = x.log_softmax(1)
    (slope,) = torch.autograd.grad(-(logp.exp() * logp).sum(), x)
    one_hot = torch.nn.functional.one_hot(target, V)
    score = token_rules.discriminator(logprob, entropy)
    torch.testing.assert_close((slope * one_hot).sum(1), -score)
    expected = token_rules.expected_discriminator(entropy, sum_p2, sum_p2_logp)
    step = 0.7 * (one_hot - logits.softmax(1))
    torch.testing.assert_close((slope * step).sum(1), -0.7 * (score - expected))


@pytest.mark.parametrize("centred", ["batch", "vocabulary"])
def test_clip_discriminator_drops_bad_tokens_far_below_the_centre(tokens, centred):
    _, _, logprob, entropy, _, sum_p2, sum_p2_logp = tokens
    score = token_rules.discriminator(logprob, entropy)
    mask, advantage = torch.rand(T) < 0.8, torch.randn(T, dtype=torch.float64)
    expected = token_rules.expected_discriminator(entropy, sum_p2, sum_p2_logp)
    centre = None if centred == "batch" else expected
    got = token_rules.clip_discriminator(score, advantage, mask, centre=centre, mu=0.5)
    z = score - (score[mask].mean() if centre is None else expected)
    far = z < -0.5 * z[mask].std(correction=0)
    assert torch.equal(got, mask & ~(far & (advantage < 0)))
    assert 0 < (mask & ~got).sum() < (mask & far).sum()


@pytest.mark.parametrize("broken", ["logprob", "advantage"])
def test_every_mask_holds_a_token_with_a_nan(case, broken):
    """Whatever its other numbers are: dropped, it would leave a loss that looks fine."""
    logprob, advantage = case.logprob.clone(), case.advantage.clone()
    {"logprob": logprob, "advantage": advantage}[broken][2, 3] = torch.nan
    assert case.mask[2, 3]
    inputs = logprob, advantage, case.mask
    assert token_rules.covariance(*inputs)[case.mask].isnan().all()
    masks = [
        token_rules.clip_cov(*inputs, fraction=0.5, low=-9.0, high=9.0),
        token_rules.kl_cov(*inputs),
        token_rules.clip_discriminator(logprob.exp(), advantage, case.mask, mu=0.1),
        token_rules.clip_discriminator(
            logprob.exp(), advantage, case.mask, centre=torch.ones_like(logprob), mu=0.1
        ),
    ]
    for mask in masks:
        assert mask[2, 3]
        assert not mask[~case.mask].any()
    assert token_rules.entropy_advantage(advantage, logprob.exp())[2, 3].isnan()


@pytest.mark.parametrize("i", range(3), ids=["logprob", "max_prob", "sum_p2"])
@pytest.mark.parametrize("wanted", [False, True])
def test_select_token_picks_a_token_with_a_nan(i, wanted):
    given = [torch.tensor([x]) for x in ((-0.7, 0.4, 0.3) if wanted else (-3.0, 0.9, 0.5))]
    assert token_rules.select_token(*given, torch.tensor([True])) == wanted
    given[i][0] = torch.nan
    assert token_rules.select_token(*given, torch.tensor([True]))
    assert not token_rules.select_token(*given, torch.tensor([False]))


def test_archers_two_ranges_with_a_kl_for_the_rest(case):
    """A recipe of rules and options together, against one written out."""
    entropy = torch.rand(6, 9, dtype=torch.float64)
    high = ek.top_entropy_mask(entropy.float(), case.mask, 0.2, scope="sequence")
    clip_low, clip_high = token_rules.two_clip_ranges(high)
    reference = case.logprob.flip(1)
    ranges = {"clip_low": clip_low, "clip_high": clip_high}
    kl = {"reference_logprob": reference, "kl_coef": torch.where(high, 0.0, 0.25)}
    tensors = case.old, case.advantage, case.mask
    got = gradient(
        case.logprob, lambda x: ratio_loss(x, *tensors, selected=case.selected, **ranges, **kl)[0]
    )
    kept = case.mask & case.selected

    def written(x):
        total = 0.0
        for b, t in kept.nonzero().tolist():
            ratio, a = (x[b, t] - case.old[b, t]).exp(), case.advantage[b, t]
            e = 0.5 if high[b, t] else 0.2
            total -= min(ratio * a, ratio.clamp(1 - e, 1 + e) * a)
            d = reference[b, t] - x[b, t]
            total += 0 if high[b, t] else 0.25 * (d.exp() - d - 1)
        return total / kept.sum()

    # The ranges are fp32, as tensors from a mask are.
    torch.testing.assert_close(got, gradient(case.logprob, written), rtol=1e-6, atol=1e-9)


def test_gradient_magnitude_is_the_entropy_times_the_loss_s_derivative(case):
    """The loss is clipped and has a KL, one token at a time; -w is its derivative in log pi."""
    entropy = torch.rand(6, 9, dtype=torch.float64)
    reference = case.logprob.flip(1)
    options = {"clip_low": 0.1, "clip_high": 0.3}
    kl = {"reference_logprob": reference, "kl_coef": 0.25}
    given = case.logprob, case.old, entropy, case.advantage
    plain = token_rules.gradient_magnitude(*given, **options)
    with_kl = token_rules.gradient_magnitude(*given, **options, **kl)
    clipped = 0
    for b, t in case.mask.nonzero().tolist():
        x = case.logprob[b, t].clone().requires_grad_()
        ratio, a = (x - case.old[b, t]).exp(), case.advantage[b, t]
        objective = torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a)
        (slope,) = torch.autograd.grad(objective, x, retain_graph=True)
        torch.testing.assert_close(plain[b, t], (entropy[b, t] * slope).abs())
        clipped += bool(slope == 0 and a != 0)
        d = reference[b, t] - x
        (slope,) = torch.autograd.grad(objective - 0.25 * (d.exp() - d - 1), x)
        torch.testing.assert_close(with_kl[b, t], (entropy[b, t] * slope).abs())
    assert 2 < clipped < case.mask.sum() - 2
    of_sequences = token_rules.gradient_magnitude(*given[:3], case.advantage_B)
    of_tokens = token_rules.gradient_magnitude(
        *given[:3], case.advantage_B[:, None].expand_as(entropy)
    )
    assert torch.equal(of_sequences, of_tokens)


def test_gradient_magnitude_needs_the_reference_of_its_kl(case):
    given = case.logprob, case.old, case.logprob.exp(), case.advantage
    with pytest.raises(ValueError, match=r"kl_coef needs reference_logprob; got kl_coef=0.1"):
        token_rules.gradient_magnitude(*given, kl_coef=0.1)


def test_silenced_are_rare_tokens_of_certain_distributions_in_right_responses():
    g = torch.Generator().manual_seed(2)
    logprob = -8 * torch.rand(4, 50, generator=g, dtype=torch.float64)
    entropy = torch.rand(4, 50, generator=g, dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    mask = torch.rand(4, 50, generator=g) < 0.9
    threshold = ek.entropy_threshold(entropy.float(), mask, fraction=0.2).double()
    got = token_rules.silence_spurious(logprob, entropy, advantage, mask, threshold)
    silenced = 0
    for b in range(4):
        for t in range(50):
            a, p, h = advantage[b], logprob[b, t].exp(), entropy[b, t]
            spurious = bool(a > 0 and p < 0.002 and h < threshold)
            assert bool(got[b, t]) == (bool(mask[b, t]) and not spurious)
            silenced += spurious and bool(mask[b, t])
    assert silenced > 5
    # 80% of the entropies lie below the threshold, and a token with A <= 0 is kept.
    assert got[1].equal(mask[1])
    assert got[2].equal(mask[2])


def test_the_band_is_its_two_bounds(tokens):
    logits, target, logprob, entropy, *_ = tokens
    mask = torch.rand(T) < 0.8
    got = token_rules.surprisal_band(logprob, entropy, mask, low=0.6, high=1.4)
    outside = [0, 0]
    for t in range(T):
        logp = logits[t].log_softmax(0)
        index = -logp[target[t]] / -(logp.exp() * logp).sum()
        assert bool(got[t]) == (bool(mask[t]) and 0.6 <= float(index) <= 1.4)
        outside[0] += bool(index < 0.6)
        outside[1] += bool(index > 1.4)
    assert min(outside) > 2
    assert 2 < got.sum() < mask.sum() - 2


def test_a_certain_token_surprises_nobody():
    zero, mask = torch.zeros(1), torch.tensor([True])
    assert not token_rules.surprisal_band(zero, zero, mask)
    assert token_rules.surprisal_band(zero, zero, mask, low=0.0)


@pytest.mark.parametrize("broken", ["logprob", "entropy", "advantage", "old_logprob"])
def test_the_newer_rules_hold_a_token_with_a_nan(broken):
    """Each of these is dropped, or ranks last, with the numbers as they were."""
    x = {"logprob": -9.0, "entropy": 0.1, "advantage": 1.0, "old_logprob": -9.0, "threshold": 0.5}
    given = {name: torch.tensor([value]) for name, value in x.items()}
    mask = torch.tensor([True])

    def rules():
        spurious = token_rules.silence_spurious(
            given["logprob"], given["entropy"], given["advantage"], mask, given["threshold"][0]
        )
        return spurious, token_rules.surprisal_band(given["logprob"], given["entropy"], mask)

    assert not any(rules())
    given[broken] = torch.tensor([torch.nan])
    if broken != "old_logprob":
        assert rules()[0]
    if broken in ("logprob", "entropy"):
        assert rules()[1]
    names = "logprob", "old_logprob", "entropy", "advantage"
    assert token_rules.gradient_magnitude(*(given[name] for name in names)).isnan()
