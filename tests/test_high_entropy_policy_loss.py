"""high_entropy_policy_loss: equation 6 end to end, and what each way to select costs."""

import copy
import sys

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _rows, backends, reference
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels.testing import Watch, peaked_head
from tests.loss_cases import policy_loss
from tests.marks import sampled

pytestmark = sampled(0.2)

B, L, D, V = 4, 50, 48, 1031
# The module, whose name in the package is the function's.
loss = sys.modules["entropy_kernels.high_entropy_policy_loss"]


@pytest.fixture
def batch():
    h, w, y = peaked_head(B * L, D, V)
    h, y = h.reshape(B, L, D), y.reshape(B, L)
    mask = torch.arange(L) < torch.tensor([50, 37, 50, 13])[:, None]
    old = (ek.linear_logprob_entropy(ek.Head(h, w, y)).logprob + 0.2 * torch.randn(B, L)).clamp_max(
        0
    )
    return h, w, y, old, torch.tensor([1.0, -1.0, 0.5, -0.3]), mask


def gradients(loss_of, h, w):
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss, metrics = loss_of(h, w)
    loss.backward()
    return loss.detach(), h.grad, w.grad, metrics


def test_equals_the_reference(batch):
    h, w, y, old, advantage, mask = batch
    got = gradients(lambda h, w: policy_loss(h, w, *batch[2:]), h, w)
    per_token = advantage[:, None].expand(B, L)

    def specification(dtype):
        flat = [x.reshape(-1).to(dtype) for x in (old, per_token)]
        return gradients(
            lambda h, w: (
                reference.high_entropy_policy_loss(
                    ek.Head(h.reshape(-1, D), w, y.reshape(-1)), *flat, mask.reshape(-1)
                ),
                {},
            ),
            h.to(dtype),
            w.to(dtype),
        )

    truth = specification(torch.float64)[:3]
    plain = worst_of_orders(lambda: specification(torch.float32)[:3], truth)
    # A row's ratio carries the error of its logprob, and the loss is one number: where a few draws
    # decide, the plain path can be lucky.
    for g, t, p in zip(got[:3], truth, plain, strict=True):
        assert_within_two_bounds(g, t, p, p)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2, 0.1])
def test_the_three_ways_agree_and_cost_what_they_say(batch, fraction, monkeypatch):
    """Units of T*V*D: 1 + 3f from the current policy's entropies, 3f with the mask known."""
    monkeypatch.setattr(loss, "LEAST_ROW_BYTES", {"cpu": 0, "cuda": 0})
    h, w, *rest, mask = batch
    rest.append(mask)
    entropy = ek.linear_logprob_entropy(ek.Head(h, w, batch[2])).entropy
    selected = ek.top_entropy_mask(entropy, mask, fraction)
    kept, tokens = int(selected.sum()), int(mask.sum())
    ways = {
        "fraction": ({"fraction": fraction}, tokens + 3 * kept),
        "threshold": (
            {"threshold": ek.entropy_threshold(entropy, mask, fraction)},
            tokens + 3 * kept,
        ),
        "selected": ({"selected": selected}, 3 * kept),
    }
    results = {}
    for name, (options, rows) in ways.items():
        with Watch() as watch:
            results[name] = gradients(
                lambda h, w, o=options: policy_loss(h, w, *rest, clip_low=1.0, clip_high=1e9, **o),
                h,
                w,
            )
        assert watch.products == rows * V * D
        metrics = results[name][3]
        assert metrics["tokens/selected"] == kept
        torch.testing.assert_close(metrics["entropy/threshold"], entropy[selected].min())
        torch.testing.assert_close(metrics["entropy/selected_mean"], entropy[selected].mean())
        assert ("entropy/mean" in metrics) == (name != "selected")
    for name in ("threshold", "selected"):
        torch.testing.assert_close(results[name][:3], results["fraction"][:3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reason", ["too large", "not worth their memory"])
def test_logits_not_kept_are_recomputed(batch, reason, monkeypatch):
    h, w, *rest = batch
    monkeypatch.setattr(loss, "LEAST_ROW_BYTES", {"cpu": 0, "cuda": 0})
    selected = torch.rand(B, L) < 0.3
    kept = gradients(lambda h, w: policy_loss(h, w, *rest, selected=selected), h, w)
    if reason == "too large":
        monkeypatch.setattr(backends, "STORED_LOGITS_BYTES", {"cpu": 0, "cuda": 0})
    else:
        least = w.shape[1] * w.element_size() + 1
        monkeypatch.setattr(loss, "LEAST_ROW_BYTES", {"cpu": least, "cuda": least})
    with Watch() as watch:
        recomputed = gradients(lambda h, w: policy_loss(h, w, *rest, selected=selected), h, w)
    rows = int((selected & rest[-1]).sum())
    active = int(recomputed[3]["head/active_rows"])
    assert watch.products == (rows + 3 * active) * V * D
    torch.testing.assert_close(recomputed[:3], kept[:3], rtol=0, atol=0)


@pytest.mark.parametrize("room", [0, 7, 1000])
def test_a_bound_of_the_selected_tokens_changes_nothing(batch, room):
    h, w, *rest, mask = batch
    selected = (torch.rand(B, L) < 0.3) & mask
    temperature = torch.rand(B, L) + 0.5
    results = []
    for bound in (None, int(selected.sum()) + room):
        options = {"max_active_rows": bound, "temperature": temperature, "selected": selected}
        results.append(gradients(lambda h, w, o=options: policy_loss(h, w, *rest, mask, **o), h, w))
    torch.testing.assert_close(results[1][:3], results[0][:3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("most", [0, 3, 4, 9, 100])
def test_places_left_over_take_other_tokens_each_once(most, monkeypatch):
    """A token that came often would have its gradients added one after the other."""
    rows = torch.rand(30) < 0.1
    numbers = rows.nonzero().squeeze(1)
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    index, real = loss._compact(rows, most)
    assert len(index) == len(set(index.tolist())) == min(max(most, 1), 30)
    assert index[real].tolist() == numbers[: len(index)].tolist()


def test_more_selected_tokens_than_their_bound_are_an_error(batch):
    selected = torch.ones(B, L, dtype=torch.bool)
    with pytest.raises(ValueError, match="max_active_rows is 9; got 150 selected tokens"):
        policy_loss(*batch, selected=selected, max_active_rows=9)


def test_forward_never_holds_tokens_times_vocabulary():
    h, w, y = peaked_head(1500, 16, 4099)
    h.requires_grad_()
    w.requires_grad_()
    with Watch() as watch:
        loss, _ = policy_loss(h, w, y, None, torch.ones(1500), torch.ones(1500, dtype=torch.bool))
        loss.backward()
    assert watch.largest < 1500 * 4099 / 4


def test_what_is_outside_the_mask_costs_nothing_and_may_be_anything(batch):
    h, w, *rest, mask = batch
    want = gradients(lambda h, w: policy_loss(h, w, *rest, mask), h, w)
    h = h.masked_fill(~mask[..., None], torch.nan)
    rest[0] = rest[0].masked_fill(~mask, -7)
    got = gradients(lambda h, w: policy_loss(h, w, *rest, mask), h, w)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("way", ["fraction", "selected", "threshold"])
def test_an_empty_mask_is_a_zero_loss_with_zero_gradients(batch, loss_type, way):
    h, w, *rest, mask = batch
    mask = torch.zeros_like(mask)
    options = {"fraction": {}, "selected": {"selected": mask}, "threshold": {"threshold": 0.1}}[way]
    loss, dh, dw, _ = gradients(
        lambda h, w: policy_loss(h, w, *rest, mask, loss_type=loss_type, **options),
        h,
        w,
    )
    assert loss == 0
    assert (dh == 0).all()
    assert (dw == 0).all()


def test_impl_names_the_head_and_the_loss(batch, impl):
    h, w, *rest = batch
    got, want = (
        gradients(lambda h, w, i=i: policy_loss(h, w, *rest, impl=i), h, w)
        for i in (impl, "reference")
    )
    torch.testing.assert_close(got[:3], want[:3], rtol=1e-3, atol=1e-6)


def test_micro_batches_equal_one_batch(batch):
    """A threshold and a count of the whole step make accumulation exact."""
    h, w, y, old, advantage, mask = batch
    whole = gradients(lambda h, w: policy_loss(h, w, *batch[2:]), h, w)
    threshold = ek.StreamingThreshold(0.2)
    for b in range(B):
        threshold.update(ek.linear_logprob_entropy(ek.Head(h[b], w, y[b])).entropy, mask[b])
    count = int(whole[3]["tokens/selected"])

    def split(h, w):
        losses = [
            policy_loss(
                h[b : b + 1],
                w,
                y[b : b + 1],
                old[b : b + 1],
                advantage[b : b + 1],
                mask[b : b + 1],
                threshold=threshold.value(),
                denominator=count,
            )[0]
            for b in range(B)
        ]
        return torch.stack(losses).sum(), {}

    torch.testing.assert_close(gradients(split, h, w)[:3], whole[:3], rtol=1e-4, atol=1e-6)


def test_per_token_temperature_follows_the_selected_rows(batch):
    h, w, *rest = batch
    temperature = torch.rand(B, L) + 0.5
    options = {"temperature": temperature, "softcap": 30.0, "bias": torch.randn(V)}
    entropy = ek.linear_logprob_entropy(ek.Head(h, w, rest[0], **options)).entropy
    selected = ek.top_entropy_mask(entropy, rest[-1])
    known = gradients(lambda h, w: policy_loss(h, w, *rest, selected=selected, **options), h, w)
    found = gradients(lambda h, w: policy_loss(h, w, *rest, **options), h, w)
    torch.testing.assert_close(known[:3], found[:3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["bottom", "random"])
def test_ablations_keep_the_same_number(batch, which):
    h, w, *rest = batch
    metrics = policy_loss(h, w, *rest, which=which)[1]
    assert metrics["tokens/selected"] == 30


def test_compiles_into_one_graph(batch, unchecked_shapes):
    h, w, *rest = batch

    def step(h, w):
        return policy_loss(h, w, *rest)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled, h, w)[:3], gradients(step, h, w)[:3], rtol=1e-5, atol=1e-6
    )


def test_module_is_the_function(batch):
    h, w, y, *rest = batch
    head = ek.Head(h, w, y)
    module = ek.HighEntropyPolicyLoss(fraction=0.5, loss_type="grpo")
    want = ek.high_entropy_policy_loss(head, *rest, fraction=0.5, loss_type="grpo")[0]
    assert torch.equal(copy.deepcopy(module)(head, *rest)[0], want)
    assert list(module.parameters()) == []
    assert "fraction=0.5" in repr(module)
    assert "loss_type='grpo'" in repr(module)


def test_the_module_s_options_take_what_changes_from_call_to_call(batch):
    h, w, y, *rest = batch
    head, mask = ek.Head(h, w.clone().requires_grad_(), y), rest[-1]
    reference, weight = rest[0] - 0.1, torch.rand(B, L)
    module = ek.HighEntropyPolicyLoss(
        loss_type="grpo",
        kl=ek.KL(0.1, "k2"),
        correction=ek.Correction("tis", cap=1.2),
        selection=ek.Selection(threshold_tolerance=1e-5),
        backend=ek.Backend("torch"),
    )
    got, metrics = module(
        *(head, *rest),
        threshold=0.5,
        denominator="all",
        num_sequences=9,
        token_weight=weight,
        reference_logprob=reference,
        sampler_logprob=reference,
        max_active_rows=B * L,
        main_grad=torch.zeros_like(w),
    )
    want, _ = ek.high_entropy_policy_loss(
        *(head, *rest),
        threshold=0.5,
        loss_type="grpo",
        denominator="all",
        aggregation=ek.Aggregation(num_sequences=9, token_weight=weight),
        kl=ek.KL(0.1, "k2", reference_logprob=reference),
        correction=ek.Correction("tis", cap=1.2, sampler_logprob=reference),
        backend=ek.Backend("torch"),
    )
    assert torch.equal(got, want)
    assert 0 < metrics["tokens/selected"] < mask.sum()


def test_entropies_within_the_tolerance_tie_with_the_threshold(batch):
    """A mask of two roundings of one entropy must not hang on them."""
    h, w, y, *rest = batch
    head, mask = ek.Head(h, w, y), rest[-1]
    entropy = ek.linear_logprob_entropy(ek.Head(h, w, y)).entropy
    tau = entropy[mask].sort().values[-30]

    def selected(threshold, tolerance):
        selection = ek.Selection(threshold_tolerance=tolerance)
        found = ek.high_entropy_policy_loss(head, *rest, threshold=threshold, selection=selection)
        assert found[1]["entropy/threshold"] == torch.as_tensor(threshold, dtype=torch.float32)
        return int(found[1]["tokens/selected"])

    for threshold in (tau * (1 + 1e-6), float(tau * (1 + 1e-6))):
        assert selected(threshold, 0.0) == 29
        assert selected(threshold, 1e-5) == 30
    assert selected(tau, 1e-5) == int((mask & (entropy >= tau * (1 - 1e-5))).sum())


BAD = {
    "two selections": ({"selected": torch.ones(B, L, dtype=torch.bool), "threshold": 0.1}, "both"),
    "selection and which": (
        {"selected": torch.ones(B, L, dtype=torch.bool), "which": "bottom"},
        "with selected=.*which='bottom'",
    ),
    "threshold and scope": ({"threshold": 0.1, "scope": "sequence"}, "with threshold=.*'sequence'"),
    "a tolerance alone": ({"threshold_tolerance": 0.1}, "meaning with threshold= only; got 0.1"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_came_and_what_was_wanted(batch, options, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        policy_loss(*batch, **options)
