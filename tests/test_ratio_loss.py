"""ratio_loss: values and gradients against the reference's loop, and every way to split a batch."""

import functools

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _native, backends, ops, reference
from entropy_kernels._bounds import assert_within_two_bounds
from tests import loss_cases
from tests.loss_cases import gradient, worst_of_shuffles
from tests.marks import sampled

pytestmark = sampled(0.2)

B, L = 5, 11
WHY_MISSING = _native.why_missing("cpu")


@pytest.fixture
def ratio_loss(impl):
    return functools.partial(loss_cases.ratio_loss, impl=impl)


@pytest.fixture
def batch(device):
    return [x.to(device) for x in make_batch()]


def make_batch():
    """Ratios inside and outside of every clip, both signs and zero advantages, ragged masks."""
    logprob = -torch.rand(B, L) * 3 - 4
    old = logprob + torch.randn(B, L) * 0.6
    old[0, 0], old[1, 1] = logprob[0, 0] + 4.0, logprob[1, 1] - 4.0
    advantage = torch.randn(B, L)
    advantage[2] = 0.0
    advantage[1, 1] = -2.0
    mask = torch.arange(L) < torch.tensor([11, 7, 4, 1, 0])[:, None]
    selected = torch.rand(B, L) < 0.6
    selected[0, 0] = selected[1, 1] = True
    return logprob, old, advantage, mask, selected


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("denominator", ["selected", "all"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_equals_the_reference(ratio_loss, batch, loss_type, denominator, dual_clip, on_policy):
    logprob, old, advantage, mask, selected = batch
    old = None if on_policy else old
    options = {"loss_type": loss_type, "denominator": denominator, "dual_clip": dual_clip}
    got = gradient(
        logprob, lambda x: ratio_loss(x, old, advantage, mask, selected=selected, **options)[0]
    )

    def formula(x, *others):
        return reference.ratio_loss(x, *others, **options)

    others = [None if old is None else old.double(), advantage.double(), mask, selected]
    truths = gradient(logprob.double(), lambda x: formula(x, *others))
    plain = worst_of_shuffles(formula, logprob, (old, advantage, mask, selected), truths)
    for g, truth, p in zip(got, truths, plain, strict=True):
        assert_within_two_bounds(g, truth, p, p)


def test_a_number_as_denominator(ratio_loss, batch):
    logprob, old, advantage, mask, selected = batch
    for count in (7, 7.0, torch.tensor(7)):
        got = ratio_loss(logprob, old, advantage, mask, selected=selected, denominator=count)[0]
        want = reference.ratio_loss(logprob, old, advantage, mask, selected, denominator=7.0)
        torch.testing.assert_close(got, want)


def test_one_advantage_a_sequence(ratio_loss, batch):
    logprob, old, advantage, mask, _ = batch
    per_sequence = advantage[:, 0]
    got = ratio_loss(logprob, old, per_sequence, mask)[0]
    want = ratio_loss(logprob, old, per_sequence[:, None].expand(B, L), mask)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("denominator", ["selected", "all"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_micro_batches_add_up_to_one_batch(ratio_loss, batch, loss_type, denominator):
    """Each micro-batch has the count of the step: accumulation changes nothing."""
    mask, selected = batch[3:]
    whole = {"loss_type": loss_type, "denominator": denominator}
    step = {"denominator": int((mask & selected if denominator == "selected" else mask).sum())}
    if loss_type == "grpo":
        step = {"num_sequences": int(mask.any(1).sum())}

    def loss(x, rows, options):
        old, advantage, mask, selected = (y[rows] for y in batch[1:])
        return ratio_loss(x[rows], old, advantage, mask, selected=selected, **options)[0]

    def split(x):
        return sum(loss(x, r, whole | step) for r in (slice(0, 1), slice(1, 4), slice(4, 5)))

    got, want = (gradient(batch[0], f) for f in (split, lambda x: loss(x, slice(None), whole)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_rows_without_gradient_are_exactly_zero(ratio_loss, batch):
    logprob, old, advantage, mask, selected = batch
    x = logprob.clone().requires_grad_()
    loss, metrics = ratio_loss(x, old, advantage, mask, selected=selected, dual_clip=3.0)
    loss.backward()
    ratio = (logprob - old).exp()
    clipped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & ((ratio < 0.8) | (ratio > 3)))
    active = mask & selected & (advantage != 0) & ~clipped
    assert torch.equal(x.grad != 0, active)
    assert metrics["head/active_rows"] == active.sum()
    kept = (mask & selected).sum()
    assert metrics["clip/high"] == (mask & selected & (advantage > 0) & clipped).sum() / kept
    assert metrics["clip/low"] == (mask & selected & (advantage < 0) & clipped).sum() / kept
    assert metrics["clip/high"] > 0
    assert metrics["clip/low"] > 0


def test_metrics_are_over_the_selected_tokens(ratio_loss, batch):
    logprob, old, advantage, mask, selected = batch
    _, metrics = ratio_loss(logprob, old, advantage, mask, selected=selected)
    log_ratio = (logprob - old)[mask & selected]
    want = {
        "ratio/mean": log_ratio.exp().mean(),
        "ratio/max": log_ratio.exp().max(),
        "kl/k1": -log_ratio.mean(),
        "kl/k3": (log_ratio.exp() - 1 - log_ratio).mean(),
        "entropy/selected_fraction": (mask & selected).sum() / mask.sum(),
        "tokens/all": mask.sum(),
        "tokens/selected": (mask & selected).sum(),
    }
    for name, value in want.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


def test_what_is_not_selected_may_be_anything(ratio_loss, batch):
    logprob, old, advantage, mask, selected = batch
    want = gradient(logprob, lambda x: ratio_loss(x, old, advantage, mask, selected=selected)[0])
    outside = ~(mask & selected)
    for value in (torch.nan, torch.inf, -torch.inf):
        dirty = [x.masked_fill(outside, value) for x in (logprob, old, advantage)]
        got = gradient(
            dirty[0],
            lambda x, d=dirty: ratio_loss(x, d[1], d[2], mask, selected=selected)[0],
        )
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("i", range(3), ids=["logprob", "old", "advantage"])
@pytest.mark.parametrize("why", ["nothing", "no advantage", "no weight", "clipped", "far"])
def test_a_selected_nan_is_in_the_gradient_whatever_else_would_be_zero(
    impl, batch, loss_type, i, why
):
    """An optimizer that looks at gradients alone must see it too."""
    logprob, old, advantage, mask, _ = batch
    weight = torch.ones_like(logprob)
    old[0, 3] = logprob[0, 3] - {"clipped": 1.0, "far": 30.0}.get(why, 0.1)
    advantage[0, 3] = 0.0 if why == "no advantage" else 1.0
    weight[0, 3] = 0.0 if why == "no weight" else 1.0
    (logprob, old, advantage)[i][0, 3] = torch.nan
    options = {"loss_type": loss_type, "impl": impl if loss_type == "dapo" else "auto"}
    logprob.requires_grad_()
    loss, metrics = loss_cases.ratio_loss(
        logprob, old, advantage, mask, token_weight=weight, **options
    )
    loss.backward()
    assert loss.isnan()
    assert logprob.grad.isnan().nonzero().tolist() == [[0, 3]]
    names = ("ratio/mean", "ratio/max", "kl/k1", "kl/k3")
    assert all(metrics[name].isnan() == (i < 2) for name in names)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_a_zero_advantage_has_no_gradient_whatever_its_logprob(ratio_loss, batch, value):
    logprob, old, advantage, mask, _ = batch
    advantage[0, 3] = 0.0
    clean = gradient(logprob, lambda x: ratio_loss(x, old, advantage, mask)[0])
    logprob[0, 3] = value
    loss, grad = gradient(logprob, lambda x: ratio_loss(x, old, advantage, mask)[0])
    assert torch.equal(loss, clean[0])
    assert torch.equal(grad, clean[1])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_nothing_selected_is_a_zero_loss_with_zero_gradients(ratio_loss, batch, loss_type):
    logprob, old, advantage, mask, _ = batch
    for part in ((slice(None),), (slice(None), slice(0)), (slice(0),)):
        x, *rest, none = (y[part] for y in (logprob, old, advantage, mask & False))
        loss, grad = gradient(
            x, lambda x, t=(*rest, none): ratio_loss(x, *t, loss_type=loss_type)[0]
        )
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(x))
        metrics = ratio_loss(x, *rest, none, loss_type=loss_type)[1]
        assert not any(metrics.values())


LAYOUTS = {
    "repeated": torch.clone,
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_same_bits_twice_and_of_any_layout(ratio_loss, impl, batch, loss_type, how):
    def loss(x, old, advantage, mask, selected):
        found, metrics = ratio_loss(x, old, advantage, mask, selected=selected, loss_type=loss_type)
        seen.append([*metrics.values()])
        return found

    seen = []
    got, want = (
        gradient(x, lambda x, r=rest: loss(x, *r))
        for x, *rest in ([LAYOUTS[how](x) for x in batch], batch)
    )
    # PyTorch sums in the order of memory.
    rtol = 1e-6 if (impl, how) == ("torch", "transposed") else 0
    torch.testing.assert_close((got, seen[0]), (want, seen[1]), rtol=rtol, atol=0)


def test_the_gradient_is_scaled_by_the_incoming_one(ratio_loss, batch):
    logprob, *rest, _ = batch
    once = gradient(logprob, lambda x: ratio_loss(x, *rest)[0])[1]
    thrice = gradient(logprob, lambda x: 3 * ratio_loss(x, *rest)[0])[1]
    assert torch.equal(thrice, 3 * once)


def op_arguments(x, old, advantage, mask, _):
    return x, old, advantage, mask, torch.rand(B, device=x.device), 0.2, 0.28, 3.0, 20.0


def test_opcheck(impl, batch, unchecked_shapes):
    batch[0].requires_grad_()
    op = torch.ops.entropy_kernels.ratio_loss.default
    torch.library.opcheck(op, (*op_arguments(*batch), impl))


def test_the_torch_path_reads_no_value():
    """What has no values cannot be read: nothing waits for a device."""
    arguments = op_arguments(*(x.to("meta") for x in make_batch()))
    results = ops.BODIES["ratio_loss"](*arguments, "torch")
    assert [tuple(x.shape) for x in results] == [(), (B, L), (4,), (3,)]


def test_auto_takes_what_fits(monkeypatch, unchecked_shapes):
    batch = make_batch()[:4]
    taken = []
    run = backends.ratio_loss
    monkeypatch.setattr(
        backends, "ratio_loss", lambda *a, **k: (taken.append(a[0]), run(*a, **k))[1]
    )
    ek.ratio_loss(*batch)
    ek.ratio_loss(*(x.double() for x in batch[:3]), batch[3])
    monkeypatch.setattr(_native, "why_missing", lambda name: f"{name} is not built")
    ek.ratio_loss(*batch)
    assert taken == ["torch" if WHY_MISSING else "cpu", "torch", "torch"]
    with pytest.raises(ValueError, match='impl="cpu" cannot run: cpu is not built'):
        ek.ratio_loss(*batch, impl="cpu")
    monkeypatch.setattr(_native, "why_missing", lambda name: None)
    with pytest.raises(ValueError, match=r'impl="cpu" needs fp32 tensors; got torch.float64'):
        ek.ratio_loss(*(x.double() for x in batch[:3]), batch[3], impl="cpu")


def test_compiles_into_one_graph(ratio_loss, batch, unchecked_shapes):
    logprob, old, advantage, mask, selected = batch

    def step(x):
        return ratio_loss(x, old, advantage, mask, selected=selected)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradient(logprob, compiled), gradient(logprob, step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
