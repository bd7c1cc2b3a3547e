"""Every loss against its written formula in fp64; what gets no gradient gets exactly none."""

import functools
import inspect
import math

import pytest
import torch

from entropy_kernels import losses
from entropy_kernels._bounds import assert_within_two_bounds
from tests import loss_formulas
from tests.loss_cases import gradient, make_case, ratio_loss, worst_of_shuffles
from tests.marks import sampled

pytestmark = sampled(0.2)

NAMES = list(losses.LOSSES)
UNCLIPPED = ["cispo", "sapo", "vespo", "gpg", "reinforce"]
OF_SEQUENCES = ["gspo", "gspo_token", "luspo", "vespo"]


def options(name):
    return {"denominator": loss_formulas.LENGTH} if name == "dr_grpo" else {}


def by_name(case, name, **more):
    """Loss and metrics, by default on all tokens of the mask."""
    return case.both(**{"loss_type": name, "selected": None} | options(name) | more)


def loss_of(case, name, **more):
    return lambda x: by_name(case._replace(logprob=x), name, **more)[0]


def test_the_table_of_formulas_is_complete():
    assert set(loss_formulas.FORMULAS) == set(losses.LOSSES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", ["clip_low", "clip_high", "dual_clip"])
def test_a_clip_that_a_loss_does_not_take_is_refused(name, clip):
    takes = clip in inspect.signature(losses.LOSSES[name][0]).parameters
    c = make_case()
    if takes and clip == "dual_clip":
        assert by_name(c, name, dual_clip=1.5)[0].isfinite()
    elif not takes:
        with pytest.raises(ValueError, match=f"{clip} has no meaning with loss_type='{name}'"):
            by_name(c, name, **{clip: 1.5})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("few", [False, True], ids=["all tokens", "selected tokens"])
def test_equals_the_written_formula(name, few):
    c = make_case()
    selected = c.selected if few else torch.ones_like(c.mask)
    got = gradient(c.logprob, loss_of(c, name, selected=selected))
    want = gradient(
        c.logprob, lambda x: loss_formulas.loss(name, x, c.old, c.advantage, c.mask, selected)
    )
    assert got[0].abs() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(got[1] == 0, want[1] == 0)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_as_good_as_the_formula_in_fp32(name):
    c = make_case()
    tensors = c.logprob, c.old, c.advantage
    fp32 = [x.float() for x in tensors]
    masks = c.mask, torch.ones_like(c.mask)
    formula = functools.partial(loss_formulas.loss, name)
    # The truth of the rounded inputs.
    x64, *others = (x.double() for x in fp32)
    truths = gradient(x64, lambda x: formula(x, *others, *masks))
    plain = worst_of_shuffles(formula, fp32[0], (*fp32[1:], *masks), truths)
    given = c._replace(old=fp32[1], advantage=fp32[2])
    got = gradient(fp32[0], loss_of(given, name))
    assert got[0].dtype == torch.float32
    for g, truth, p in zip(got, truths, plain, strict=True):
        # A sigmoid's s (1 - s) loses what the formula's exponential keeps.
        assert_within_two_bounds(g, truth, p, p, factor=4 if name == "sapo" else 2)


@pytest.mark.parametrize("name", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_kernel_is_the_plain_function(name):
    """A partial of the same function takes the way of the other losses."""
    c = make_case()
    how = losses.LOSSES[name][1]
    for dual in (None, 3.0):
        plain = functools.partial(losses.clipped_ratio, dual_clip=dual)
        more = {"selected": c.selected, "aggregation": how} | options(name)
        got = gradient(c.logprob, loss_of(c, plain, **more))
        want = gradient(c.logprob, loss_of(c, name, selected=c.selected, dual_clip=dual))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
            assert torch.equal(g == 0, w == 0)


def clipped_tokens(name, c):
    """Where the papers say that the gradient is zero though the advantage is not."""
    up, ratio = c.advantage > 0, (c.logprob - c.old).exp()
    if name in ("dapo", "grpo", "bnpo", "dr_grpo"):
        return torch.where(up, ratio > 1.28, ratio < 0.8)
    if name in ("gspo", "gspo_token", "luspo"):
        low, high = (2e-3, 2.5e-3) if name == "luspo" else (3e-4, 4e-4)
        total = torch.where(c.mask, c.logprob - c.old, 0).sum(1, keepdim=True)
        mean = (total / c.mask.sum(1, keepdim=True).clamp_min(1)).exp()
        return torch.where(up, mean > 1 + high, mean < 1 - low).expand_as(up)
    if name == "gmpo":
        return torch.where(up, c.logprob - c.old > 0.4, c.logprob - c.old < -0.4)
    if name == "dppo_tv":
        moved = c.logprob.exp() - c.old.exp()
        return torch.where(up, moved > 0.15, moved < -0.15)
    return torch.zeros_like(up)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dppo_kl"])
def test_rows_without_gradient_are_exactly_zero(name):
    """Unselected, clipped and of zero advantage: 0.0, not nearly so."""
    c = make_case()
    # One advantage a sequence where a zero one would not be the token's own matter.
    advantage = c.advantage_B if name in ("gspo", "luspo", "gmpo") else c.advantage
    c = c._replace(advantage=advantage if advantage.ndim == 2 else advantage[:, None].expand(6, 9))
    c = c._replace(advantage=torch.where(torch.arange(6)[:, None] == 1, 0.0, c.advantage))
    fp32 = c._replace(old=c.old.float(), advantage=c.advantage.float())
    grad = gradient(c.logprob.float(), loss_of(fp32, name, selected=c.selected))[1]
    active = c.mask & c.selected & (c.advantage != 0) & ~clipped_tokens(name, c)
    assert torch.equal(grad != 0, active)
    assert 0 < active.sum() < (c.mask & c.selected).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["nothing kept", "no advantage"])
def test_nothing_to_learn_is_a_zero_loss_with_zero_gradients(name, way):
    c = make_case()
    nothing = {"mask": c.mask & False} if way == "nothing kept" else {"advantage": c.advantage * 0}
    c = c._replace(**nothing)
    loss, grad = gradient(c.logprob, loss_of(c, name))
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(v.isfinite() for v in by_name(c, name)[1].values())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNCLIPPED])
def test_all_tokens_clipped_is_a_loss_without_gradient(name):
    c = make_case()
    likely, unlikely = torch.full_like(c.logprob, -0.01), torch.full_like(c.logprob, -2.0)
    rose = c.advantage_B[:, None] > 0
    x, old = torch.where(rose, likely, unlikely), torch.where(rose, unlikely, likely)
    loss, grad = gradient(x, loss_of(c._replace(old=old, advantage=c.advantage_B), name))
    assert torch.equal(grad, torch.zeros_like(grad))
    # DPPO gives a token outside of its region no loss at all, the others that of the bound.
    assert (loss == 0) == name.startswith("dppo")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_outside_the_mask_may_be_anything(name):
    """No 0 * inf: not in the loss, not in a gradient, not in a metric."""
    c = make_case()
    kept = c.mask & c.selected
    outside = ~c.mask if name in OF_SEQUENCES else ~kept
    clean = gradient(c.logprob, loss_of(c, name, selected=c.selected))
    for value in (torch.nan, torch.inf, -torch.inf):
        names = "logprob", "old", "advantage"
        dirty = c._replace(**{n: getattr(c, n).masked_fill(outside, value) for n in names})
        weight = torch.ones_like(c.logprob).masked_fill(outside, value)
        sampler = dirty.old.masked_fill(kept, 0) + c.old.masked_fill(~kept, 0)
        more = {"token_weight": weight, "reference_logprob": dirty.logprob, "kl_coef": 0.0}
        more["selected"] = c.selected
        if name != "vespo":
            more |= {"sampler_logprob": sampler, "correction": "tis"}
        got = gradient(dirty.logprob, loss_of(dirty, name, **more))
        torch.testing.assert_close(got, clean, rtol=0, atol=0)
        assert all(v.isfinite() for v in by_name(dirty, name, **more)[1].values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("i", range(4), ids=["logprob", "old", "advantage", "token_weight"])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_kept_nan_is_in_the_loss_and_in_the_gradient(name, i, clipped):
    """clamp and where give it a gradient of zero, and a loss may forget it."""
    c = make_case()
    # Log-probabilities, also where they are moved.
    inputs = [c.logprob - 4, c.old - 4, c.advantage.clone(), torch.ones_like(c.logprob)]
    if clipped:
        inputs[1][:3] = inputs[0][:3] - 3 * inputs[2][:3].sign()
    inputs[i][0, 1] = torch.nan
    c = c._replace(old=inputs[1], advantage=inputs[2])
    loss, grad = gradient(inputs[0], loss_of(c, name, token_weight=inputs[3]))
    assert loss.isnan()
    assert grad[0, 1].isnan()
    assert grad[1:].isfinite().all()


@pytest.mark.parametrize("name", sorted(OF_SEQUENCES))
def test_a_nan_in_the_sum_of_a_sequence_is_in_its_gradient(name):
    """Also where the token itself is not kept: the loss is NaN by it."""
    c = make_case()
    selected, old = c.selected.clone(), c.old.clone()
    selected[0, 1], selected[0, 2], old[0, 1] = False, True, torch.nan
    more = {"selected": selected, "sequence_over": "all"}
    loss, grad = gradient(c.logprob, loss_of(c._replace(old=old), name, **more))
    assert loss.isnan()
    assert grad[0][selected[0]].isnan().all()
    assert grad[1:].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_stay_finite(name):
    c = make_case()
    for shift in (-200, 200):
        x = c.logprob - max(shift, 0)
        got = gradient(x, loss_of(c._replace(old=x + shift), name))
        assert got[0].isfinite()
        assert got[1].isfinite().all()


@pytest.mark.parametrize("name", ["dapo", "sapo", "gmpo", "gspo"])
def test_a_log_ratio_is_clamped_at_twenty(name):
    """Not at 10 nor at 88, where fp32 ends; of sapo's gate the limit is all that is left."""
    x = -torch.ones(1, 1, dtype=torch.float64)
    got = gradient(
        x, lambda x: ratio_loss(x, x.detach() - 30, x.detach(), x < 0, loss_type=name)[0]
    )
    want = 4 / 1.05 if name == "sapo" else math.exp(20)
    torch.testing.assert_close(got[0], torch.tensor(want, dtype=torch.float64))
    assert got[1] == 0


@pytest.mark.parametrize("name", ["cispo", "gpg", "reinforce", "vespo", "dppo_tv"])
def test_a_token_without_advantage_may_be_impossible(name):
    """-inf as its log-probability, of a vocabulary that is masked in one engine: 0 * inf is 0."""
    c = make_case()
    c.advantage[1] = 0
    clean = gradient(c.logprob, loss_of(c, name))
    c.logprob[1, 3] = -torch.inf
    got = gradient(c.logprob, loss_of(c, name))
    torch.testing.assert_close(got, clean, rtol=0, atol=0)


@pytest.mark.parametrize("delta", [1.28, 1.5, 4.0])
def test_a_two_sided_delta_is_the_dual_clip(delta):
    """INTELLECT-2: -min(min(r, delta) A, clip(r) A)."""
    c = make_case()

    def two_sided(x):
        ratio = (x - c.old).exp()
        terms = ratio.clamp(max=delta) * c.advantage, ratio.clamp(0.8, 1.28) * c.advantage
        return -torch.where(c.mask, torch.minimum(*terms), 0).sum() / c.mask.sum()

    got = gradient(c.logprob, loss_of(c, "dapo", dual_clip=delta))
    torch.testing.assert_close(got, gradient(c.logprob, two_sided), rtol=1e-12, atol=1e-14)


def test_options_of_a_loss_are_set_by_partial():
    c = make_case()
    softer = functools.partial(losses.sapo, tau_neg=1.1)
    assert by_name(c, softer)[0] != by_name(c, "sapo")[0]
    same = functools.partial(losses.sapo, tau_neg=1.05)
    assert torch.equal(by_name(c, same)[0], by_name(c, "sapo")[0])
    assert torch.equal(by_name(c, losses.gspo)[0], by_name(c, "gspo")[0])
    narrow = functools.partial(losses.gspo, clip_low=1e-5, clip_high=1e-5)
    got = by_name(c, "gspo", clip_low=1e-5, clip_high=1e-5)[0]
    assert torch.equal(by_name(c, narrow)[0], got)
    assert got != by_name(c, "gspo")[0]


def test_a_loss_of_ones_own():
    """prime-rl's form, unclipped, with a square of the log-ratio; its mask is the kept tokens."""
    c = make_case()

    def mine(logprob, old_logprob, advantage, mask):
        assert torch.equal(mask, c.mask & c.selected)
        log_ratio = logprob - old_logprob
        return -log_ratio.exp() * advantage + 1e-3 * log_ratio.square()

    got = gradient(c.logprob, loss_of(c, mine, selected=c.selected))
    kept = c.mask & c.selected
    want = gradient(c.logprob, lambda x: mine(x, c.old, c.advantage, kept)[kept].sum() / kept.sum())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "sapo", "dppo_kl"])
def test_compiles_into_one_graph(name, unchecked_shapes):
    c = make_case()
    step = loss_of(c, name, selected=c.selected)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradient(c.logprob, compiled), gradient(c.logprob, step), rtol=1e-12, atol=1e-14
    )
