"""high_entropy_policy_loss over sets: the clipped loss of the truncated policy that sampled.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import reference
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels.testing import peaked_head
from tests.marks import sampled
from tests.support_cases import masked, random_sets, unsorted

pytestmark = sampled(0.2)

B, L, D, V = 4, 20, 16, 41
LENGTHS = torch.tensor([20, 17, 20, 6])


@pytest.fixture
def batch(device):
    """Hidden, weight, targets, which ids are kept, old log-probs, advantages and the mask."""
    h, w, y = peaked_head(B * L, D, V)
    kept = random_sets(y, V, seed=4)
    old = masked(torch.float32, h, w, y, kept)[0] + 0.2 * torch.randn(B * L)
    mask = torch.arange(L) < LENGTHS[:, None]
    kept[~mask.flatten()] = False  # Where nothing is trained sets may be empty.
    given = h.reshape(B, L, D), w, y.reshape(B, L), kept, old.reshape(B, L).clamp_max(0)
    return [x.to(device) for x in (*given, torch.tensor([1.0, -1.0, 0.5, -0.3]), mask)]


def written_out(dtype, h, w, y, kept, old, advantage, mask, select):
    """The clipped loss of the selected tokens, from masked logits."""
    y = torch.where(mask, y, -100)
    logprob, entropy = (
        x.reshape(B, L) for x in masked(dtype, h.reshape(-1, D), w, y.reshape(-1), kept)[:2]
    )
    selected = select(entropy.detach(), mask)
    ratio, advantage = (logprob - old).exp(), advantage[:, None].to(dtype)
    clipped = ratio.clamp(1 - 0.2, 1 + 0.28)
    token = -torch.minimum(ratio * advantage, clipped * advantage)
    return torch.where(selected, token, 0.0).sum() / selected.sum()


def gradients(loss_of, h, w):
    leaves = [x.detach().clone().requires_grad_() for x in (h, w)]
    loss = loss_of(*leaves)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


def top(entropy, mask):
    return reference.top_entropy_mask(entropy, mask, 0.3)


WAYS = ("fraction", "threshold", "selected", "bounded", "bottom", "sequence")


def way_of(name, entropy, mask):
    """The options, and which tokens they select."""
    selected = top(entropy, mask)
    rows = mask.sum(1)
    if name == "threshold":
        return {"threshold": entropy[selected].min()}, selected
    if name in ("selected", "bounded"):
        return {"selected": selected | ~mask}, selected
    if name == "bottom":
        chosen = reference.top_entropy_mask(entropy, mask, 0.3, which="bottom")
        return {"fraction": 0.3, "selection": ek.Selection("bottom")}, chosen
    if name == "sequence":
        chosen = reference.top_entropy_mask(entropy, mask, 0.3, scope="sequence")
        assert (chosen.sum(1) == (3 * rows + 9) // 10).all()
        return {"fraction": 0.3, "selection": ek.Selection(scope="sequence")}, chosen
    return {"fraction": 0.3}, selected


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_that_of_the_truncated_policy(batch, way, impl):
    h, w, y, kept, old, advantage, mask = batch
    support = unsorted(kept)
    entropy = ek.linear_logprob_entropy(
        ek.Head(h, w, torch.where(mask, y, -100)), support=support, impl=impl
    ).entropy
    options, selected = way_of(way, entropy, mask)
    backend = ek.Backend(impl, max_active_rows=int(selected.sum()) if way == "bounded" else None)
    metrics = {}

    def ours(h, w):
        loss, found = ek.high_entropy_policy_loss(
            *(ek.Head(h, w, y), old, advantage, mask), **options, support=support, backend=backend
        )
        metrics.update(found)
        return loss

    def typed(dtype):
        return gradients(
            lambda h, w: written_out(
                dtype, h, w, y, kept, old.to(dtype), advantage, mask, lambda *_: selected
            ),
            h.to(dtype),
            w.to(dtype),
        )

    truth = typed(torch.float64)
    plain = worst_of_orders(lambda: typed(torch.float32), truth)
    got = gradients(ours, h, w)
    for g, t, p in zip(got, truth, plain, strict=True):
        # A row's ratio carries the error of its log-prob.
        assert_within_two_bounds(g, t, p, p, operands=torch.float16 if h.is_cuda else torch.float32)
    assert metrics["tokens/selected"] == selected.sum()
    torch.testing.assert_close(metrics["entropy/selected_mean"], entropy[selected].mean())
    if way not in ("selected", "bounded"):
        torch.testing.assert_close(metrics["entropy/mean"], entropy[mask].mean())


def test_ragged_tokens_have_their_sets_in_order(batch, impl):
    h, w, y, kept, old, advantage, mask = batch
    padded = ek.high_entropy_policy_loss(
        *(ek.Head(h, w, y), old, advantage, mask),
        loss_type="gspo",
        support=unsorted(kept),
        backend=ek.Backend(impl),
    )
    real = mask.flatten()
    ragged = ek.high_entropy_policy_loss(
        *(ek.Head(h[mask], w, y[mask]), old[mask], advantage, mask[mask]),
        loss_type="gspo",
        lengths=LENGTHS.to(mask.device),
        support=unsorted(kept).at(real.nonzero().squeeze(1)),
        backend=ek.Backend(impl),
    )
    torch.testing.assert_close(ragged[0], padded[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ragged[1], padded[1], rtol=1e-5, atol=1e-7)


def test_the_specification_takes_sets(batch, impl):
    h, w, y, kept, old, advantage, mask = batch
    per_token = advantage[:, None].expand(B, L)
    flat = [x.reshape(-1).double() for x in (old, per_token)]
    y = torch.where(mask, y, -100)
    head = ek.Head(h.reshape(-1, D).double(), w.double(), y.reshape(-1))
    support = unsorted(kept)
    want = reference.high_entropy_policy_loss(
        head, *flat, mask.reshape(-1), fraction=0.3, support=support
    )
    written = written_out(
        torch.float64, h, w, y, kept, old.double(), advantage, mask, lambda e, m: top(e, m)
    )
    torch.testing.assert_close(want, written, rtol=1e-9, atol=1e-12)
    got, _ = ek.high_entropy_policy_loss(
        *(ek.Head(h, w, y), old, advantage, mask),
        fraction=0.3,
        support=support,
        backend=ek.Backend(impl),
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)


def test_the_module_takes_them_with_each_call(batch, impl):
    h, w, y, kept, *rest = batch
    module = ek.HighEntropyPolicyLoss(fraction=0.5, backend=ek.Backend(impl))
    support = unsorted(kept)
    head = ek.Head(h, w, y)
    want = ek.high_entropy_policy_loss(
        head, *rest, fraction=0.5, support=support, backend=ek.Backend(impl)
    )
    got = module(head, *rest, support=support)
    assert torch.equal(got[0], want[0])
    assert not torch.equal(got[0], module(head, *rest)[0])


def test_a_batch_of_sets_of_one_has_no_gradient(batch, impl):
    h, w, y, _, old, advantage, mask = batch
    kept = torch.zeros(B * L, V, dtype=torch.bool, device=h.device)
    kept[torch.arange(B * L), y.flatten()] = True
    loss, dh, dw = gradients(
        lambda h, w: ek.high_entropy_policy_loss(
            *(ek.Head(h, w, y), torch.zeros_like(old), advantage, mask),
            support=unsorted(kept),
            backend=ek.Backend(impl),
        )[0],
        h,
        w,
    )
    assert loss.isfinite()
    assert not dh.any()
    assert not dw.any()


@pytest.mark.parametrize("wrong", ["type", "tokens", "target"])
def test_bad_sets_are_refused_by_name(batch, wrong, unchecked_shapes):
    h, w, y, kept, *rest = batch
    support = unsorted(kept)
    given, message = {
        "type": (kept, r"support must be a Support or None; got torch.bool \(80, 41\)"),
        "tokens": (support.at(torch.arange(79)), r"offsets must be \[81\].*got \(80,\)"),
        "target": (unsorted(kept.roll(1, 0)), "target of each token must be in its set"),
    }[wrong]
    if h.is_cuda and wrong == "target":
        pytest.skip("values are not read on a GPU")
    with pytest.raises(ValueError, match=message):
        ek.high_entropy_policy_loss(ek.Head(h, w, y), *rest, support=given)
