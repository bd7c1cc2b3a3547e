"""The KL to a reference, the correction of a sampler, weights, aggregations."""

import functools
import math

import pytest
import torch

from entropy_kernels import loss_terms, losses
from tests.loss_cases import L, gradient, make_case, ratio_loss
from tests.loss_formulas import LENGTH

KINDS = {
    "k1": lambda d, r: d,
    "k2": lambda d, r: d**2 / 2,
    "k3": lambda d, r: (-d).exp() - 1 + d,
    "abs": lambda d, r: d.abs(),
    "k3_corrected": lambda d, r: r * ((-d).exp() - 1 + d),
}


@pytest.fixture
def case():
    return make_case()


@pytest.fixture
def reference(case):
    g = torch.Generator().manual_seed(7)
    return case.logprob + 0.4 * torch.randn(case.logprob.shape, generator=g, dtype=torch.float64)


def loss_of(case, **options):
    return functools.partial(case.loss, **options)


def assert_gradients_equal(got, want, rtol=1e-12):
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", ["selected", "all"])
@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_kl_is_its_formula_on_its_tokens(case, reference, kind, on, loss_type):
    kept = case.mask & case.selected
    tokens = kept if on == "selected" else case.mask
    options = {"loss_type": loss_type, "aggregation": "token-mean"}

    def written(x):
        kl = KINDS[kind](x - reference, (x - case.old).exp())
        return loss_of(case, **options)(x) + 0.3 * kl[tokens].sum() / tokens.sum()

    more = {"reference_logprob": reference, "kl_coef": 0.3, "kl_type": kind, "kl_on": on}
    got = gradient(case.logprob, loss_of(case, **options, **more))
    assert_gradients_equal(got, gradient(case.logprob, written))
    assert (got[1][~tokens] == 0).all()
    metrics = case.both(**more)[1]
    value = KINDS[kind](case.logprob - reference, (case.logprob - case.old).exp())[tokens].mean()
    torch.testing.assert_close(metrics["kl/reference"], value)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_straight_through_has_the_value_of_one_and_the_gradient_of_another(case, reference, kind):
    through, value, slope = (
        gradient(
            case.logprob,
            lambda x, t=t: loss_terms.kl_divergence(x, reference, t)[case.mask].sum(),
        )
        for t in (f"{kind}+", kind, "k2")
    )
    assert_gradients_equal(through, (value[0], slope[1]))


def test_only_k2_has_the_gradient_of_the_kl():
    """Exactly, over a vocabulary: d KL / d logits = E_p[k2' d log p], which k1 and k3 miss."""
    logits = torch.randn(7, dtype=torch.float64)
    other = torch.randn(7, dtype=torch.float64).log_softmax(0)

    def expected(kind):
        x = logits.clone().requires_grad_()
        logp = x.log_softmax(0)
        kl = loss_terms.kl_divergence(logp, other, kind, logp.detach())
        (logp.detach().exp() * kl).sum().backward()
        return x.grad

    x = logits.clone().requires_grad_()
    (x.softmax(0) * (x.log_softmax(0) - other)).sum().backward()
    for kind in ("k2", "k1+", "k3+", "k3_corrected"):
        torch.testing.assert_close(expected(kind), x.grad, rtol=1e-12, atol=1e-14)
    assert expected("k1").abs().max() < 1e-15
    assert (expected("k3") - x.grad).abs().max() > 0.01


def test_a_far_reference_stays_finite(case):
    for shift in (-300, 300):
        logprob = case.logprob - max(shift, 0)
        for kind in (*KINDS, "k1+", "k3+"):
            got = gradient(
                logprob,
                loss_of(case, reference_logprob=logprob + shift, kl_coef=0.1, kl_type=kind),
            )
            assert got[0].isfinite()
            assert got[1].isfinite().all()


def by_hand(correction, log_ratio, mask, cap, floor):
    """One sequence and token after another."""
    weight = torch.ones_like(log_ratio)
    for b in range(len(log_ratio)):
        total = sum(float(log_ratio[b, t]) for t in range(L) if mask[b, t])
        for t in range(L):
            over = total if correction.startswith("sequence") else float(log_ratio[b, t])
            w = math.exp(over)
            inside = (floor or 0) <= w <= (cap or math.inf)
            if correction in ("mis", "sequence_mask"):
                w = w if inside else 0.0
            else:
                w = min(max(w, floor or 0), cap or math.inf)
            weight[b, t] = w
    return weight


@pytest.mark.parametrize("correction", loss_terms.CORRECTIONS)
@pytest.mark.parametrize(("cap", "floor"), [(2.0, None), (2.0, 0.5), (None, 0.8)])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo_token"])
def test_corrections_are_weights(case, correction, cap, floor, loss_type):
    g = torch.Generator().manual_seed(3)
    move = 0.5 * torch.randn(case.old.shape, generator=g, dtype=torch.float64)
    move = move.maximum(case.old)
    # A ratio that would count, were it of a token of the mask.
    sampler = (case.old - move).masked_fill(~case.mask, -99.0)
    options = {"sampler_logprob": sampler, "correction": correction}
    options |= {"correction_cap": cap, "correction_floor": floor, "loss_type": loss_type}
    got = gradient(case.logprob, loss_of(case, **options))
    weight = by_hand(correction, move, case.mask, cap, floor)
    want = gradient(case.logprob, loss_of(case, token_weight=weight, loss_type=loss_type))
    assert_gradients_equal(got, want)
    metrics = case.both(**options)[1]
    kept = case.mask & case.selected
    expected = {
        "mismatch/k3": (move.exp() - 1 - move)[kept].mean(),
        "mismatch/max_ratio": move.exp()[kept].max(),
        "mismatch/difference": move.abs()[kept].mean(),
        "mismatch/outside": (weight != by_hand(correction, move, case.mask, None, None))[kept]
        .double()
        .mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].double(), value)
    if correction.endswith(("mis", "mask")):
        assert (got[1][weight == 0] == 0).all()


@pytest.mark.parametrize("correction", loss_terms.CORRECTIONS)
@pytest.mark.parametrize(("cap", "floor"), [(1.1, None), (1.1, 0.9), (None, 0.8)])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo_token"])
def test_where_old_is_the_sampler_the_whole_ratio_is_corrected(
    case, correction, cap, floor, loss_type
):
    """The ratio is in the loss: its weight is what makes of it the corrected one."""
    move = case.logprob - case.old
    options = {"sampler_logprob": case.old, "correction": correction, "correction_of": "current"}
    options |= {"correction_cap": cap, "correction_floor": floor, "loss_type": loss_type}
    got = gradient(case.logprob, loss_of(case, **options))
    total = by_hand(correction, move, case.mask, None, None)
    corrected = by_hand(correction, move, case.mask, cap, floor)
    weight = corrected / total
    want = gradient(case.logprob, loss_of(case, token_weight=weight, loss_type=loss_type))
    assert_gradients_equal(got, want)
    kept = case.mask & case.selected
    outside = (corrected != total)[kept].double().mean()
    metrics = case.both(**options)[1]
    torch.testing.assert_close(metrics["mismatch/outside"].double(), outside)
    assert metrics["mismatch/outside"] > 0
    torch.testing.assert_close(metrics["mismatch/difference"].double(), move.abs()[kept].mean())


def test_of_the_current_policy_tis_is_the_truncated_ratio_by_its_formula():
    """Without clips: the loss is -min(r, cap) A, and its gradient -min(sg(r), cap) A."""
    old = torch.tensor([[-2.0, -2.0, -2.0]], dtype=torch.float64)
    move = torch.tensor([[0.1, 1.5, -1.0]], dtype=torch.float64)
    advantage, mask = torch.tensor([[-1.0, -1.0, 2.0]], dtype=torch.float64), old < 0
    options = {"clip_low": 1.0, "clip_high": 9.0, "denominator": 1.0, "correction_of": "current"}
    options |= {"sampler_logprob": old, "correction_cap": 2.0}
    ratio = move.exp()
    for correction, kept in (("tis", ratio.clamp(max=2)), ("mis", ratio * (ratio <= 2))):
        loss, grad = gradient(
            old + move,
            lambda x, c=correction: ratio_loss(x, old, advantage, mask, correction=c, **options)[0],
        )
        assert_gradients_equal((loss, grad), (-(kept * advantage).sum(), -kept * advantage))


def test_a_log_prob_that_the_engine_did_not_report_is_not_corrected(case):
    sampler = case.old - 3
    sampler[0, 1] = torch.nan
    options = {"sampler_logprob": sampler, "correction": "mis"}
    grad, plain = (
        gradient(case.logprob, loss_of(case, selected=None, **x))[1] for x in (options, {})
    )
    assert grad[0, 1] == plain[0, 1] != 0
    assert (grad[1:] == 0).all()


@pytest.mark.parametrize("correction", loss_terms.CORRECTIONS)
def test_a_broken_old_log_prob_is_in_no_correction_a_number(case, correction):
    ratio = torch.tensor([torch.nan, 1.0, 9.0])
    got = loss_terms.correction_weight(ratio, correction, cap=2.0, floor=0.5)
    assert got.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("kind", loss_terms.KL_TYPES)
@pytest.mark.parametrize("broken", ["reference", "coefficient"])
def test_a_nan_of_the_kl_is_in_the_loss_and_in_the_gradient(case, kind, broken):
    reference, coef = case.old - 0.3, torch.ones_like(case.old)
    (reference if broken == "reference" else coef)[0, 1] = torch.nan
    loss, grad = gradient(
        case.logprob,
        loss_of(case, selected=None, reference_logprob=reference, kl_coef=coef, kl_type=kind),
    )
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[0, 1]]


def test_a_small_mismatch_has_a_metric_with_digits():
    old = -torch.rand(1000)
    sampler = (old + 1e-4 * torch.randn(1000)).clamp_max(0)
    ones = torch.ones(1000)
    got = ratio_loss(old, old, ones, ones > 0, sampler_logprob=sampler)[1]["mismatch/k3"]
    d = old.double() - sampler.double()
    torch.testing.assert_close(got.double(), (d.expm1() - d).mean(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "gspo"])
def test_weights_multiply_the_loss_of_their_tokens(case, loss_type):
    """In the kernel they are folded into the advantage; elsewhere they are not."""
    weight = torch.rand(case.mask.shape, dtype=torch.float64)
    weight[:, ::3] = 0
    got = gradient(case.logprob, loss_of(case, token_weight=weight, loss_type=loss_type))
    kept = case.mask & case.selected
    function, how = losses.LOSSES[loss_type]

    def written(x):
        over = case.mask if loss_type == "gspo" else kept
        x = torch.where(kept, x, x.detach())
        tokens = torch.where(kept, function(x, case.old, case.advantage, over) * weight, 0)
        if how == "token-mean":
            return tokens.sum() / kept.sum()
        return (tokens.sum(1) / kept.sum(1).clamp_min(1)).sum() / case.mask.any(1).sum()

    assert_gradients_equal(got, gradient(case.logprob, written))
    if loss_type != "gspo":
        assert (got[1][weight == 0] == 0).all()
    given = weight > 0, (weight > 0).double()
    as_bool, as_ones = (case.both(token_weight=x, loss_type=loss_type)[0] for x in given)
    assert torch.equal(as_bool, as_ones)


def steps(case, **more):
    """The whole batch in one call, and in three: both sum to the step's loss."""
    rows = [slice(0, 1), slice(1, 4), slice(4, 6)]

    def one(x, r):
        tensors = {k: v[r] for k, v in more.items() if isinstance(v, torch.Tensor) and v.ndim == 2}
        return type(case)(*(v[r] for v in case)).loss(x[r], **more | tensors)

    whole = gradient(case.logprob, lambda x: one(x, slice(None)))
    return whole, gradient(case.logprob, lambda x: sum(one(x, r) for r in rows))


@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "gmpo"])
@pytest.mark.parametrize("aggregation", loss_terms.AGGREGATIONS)
@pytest.mark.parametrize("terms", [False, True], ids=["loss", "with terms"])
def test_accumulation_and_sharding_change_nothing(case, reference, loss_type, aggregation, terms):
    """With the counts of the step every split of it has the sum of one batch."""
    kept, present = int((case.mask & case.selected).sum()), int(case.mask.any(1).sum())
    counts = {
        "token-mean": {"denominator": kept},
        "seq-mean-token-mean": {"num_sequences": present},
        "seq-mean-token-sum": {"num_sequences": present},
        "seq-mean-token-sum-norm": {"num_sequences": present, "denominator": LENGTH},
    }[aggregation]
    options = {"loss_type": loss_type, "aggregation": aggregation} | counts
    if terms:
        entropy = torch.rand(case.mask.shape, dtype=torch.float64)
        options |= {"reference_logprob": reference, "kl_coef": 0.1, "kl_type": "k3+"}
        options |= {"entropy": entropy, "entropy_coef": 0.2, "token_weight": entropy}
        options |= {"sampler_logprob": case.old + 0.1, "correction": "sequence_truncate"}
    whole, split = steps(case, **options)
    assert_gradients_equal(split, whole)
    if not terms:
        own = {k: v for k, v in options.items() if k != "num_sequences" and v != kept}
        torch.testing.assert_close(case.both(**own)[0], whole[0])


@pytest.mark.parametrize("over", ["all", "selected"])
@pytest.mark.parametrize("loss_type", ["gspo", "gspo_token", "luspo", "vespo", "gmpo"])
def test_what_a_sequence_is_summed_over(case, loss_type, over):
    """The value may hang on tokens that are not kept; the gradient never does."""
    kept = case.mask & case.selected
    other = case._replace(logprob=torch.where(kept, case.logprob, case.logprob - 0.01))
    got, moved = (
        gradient(c.logprob, loss_of(c, loss_type=loss_type, sequence_over=over))
        for c in (case, other)
    )
    assert torch.equal(got[0], moved[0]) == (over == "selected")
    assert (got[1][~kept] == 0).all()
    by_default = gradient(case.logprob, loss_of(case, loss_type=loss_type))
    assert torch.equal(by_default[0], got[0]) == (
        over == losses.SEQUENCE_OVER[losses.LOSSES[loss_type][0]]
    )
