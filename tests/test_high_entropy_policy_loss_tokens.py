"""high_entropy_policy_loss: what is a token at all, and that no way to select forgets a NaN."""

from dataclasses import replace

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _rows, reference
from entropy_kernels.testing import peaked_head
from tests.loss_cases import policy_loss
from tests.marks import sampled
from tests.test_high_entropy_policy_loss import gradients

pytestmark = sampled(0.2)

B, L, D, V = 3, 15, 16, 131

# numpy, which computes in Triton's interpreter, warns of NaN that is meant.
infinities = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def batch():
    h, w, y = peaked_head(B * L, D, V)
    h, y = h.reshape(B, L, D), y.reshape(B, L)
    mask = torch.arange(L) < torch.tensor([15, 12, 7])[:, None]
    return h, w, y, -torch.rand(B, L), torch.tensor([1.0, -1.0, 0.5]), mask


WAYS = {
    "fraction": {},
    "sequence": {"scope": "sequence"},
    "bottom": {"which": "bottom"},
    "random": {"which": "random"},
    "threshold": {"threshold": 1.0},
    "selected": {"selected": torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.7},
}
OPTIONS = {
    "dapo": {},
    "all": {"denominator": "all"},
    "grpo": {"loss_type": "grpo"},
    "kl": {"kl_coef": 0.1, "kl_on": "all", "reference_logprob": torch.full((B, L), -2.0)},
}


def to(device, x):
    if isinstance(x, dict):
        return {name: to(device, value) for name, value in x.items()}
    return x.to(device) if isinstance(x, torch.Tensor) else x


def gradients_by(impl, device, batch, options):
    """The loss, the gradients of hidden and weight, the metrics; the same draws each time."""
    torch.manual_seed(3)
    h, w, *rest = (x.to(device) for x in batch)
    options = to(device, options)
    return gradients(lambda h, w: policy_loss(h, w, *rest, impl=impl, **options), h, w)


@pytest.mark.parametrize(
    ("way", "more"),
    # With selected= the head knows nothing of the tokens that kl_on="all" reads.
    [
        *(("fraction", more) for more in OPTIONS),
        *(("sequence", "kl"), ("bottom", "grpo"), ("random", "all"), ("threshold", "kl")),
        *(("selected", more) for more in ("dapo", "all", "grpo")),
    ],
)
def test_a_target_that_is_none_is_no_token_whatever_the_mask_says(batch, impl, device, way, more):
    h, w, y, old, advantage, mask = batch
    real = torch.rand(B, L) < 0.5
    real[2] = False
    options = WAYS[way] | OPTIONS[more]
    without = h, w, y.masked_fill(~real, -100), old, advantage, mask
    got = gradients_by(impl, device, without, options)
    want = gradients_by(impl, device, (h, w, y, old, advantage, mask & real), options)
    torch.testing.assert_close(got[:3], want[:3], rtol=0, atol=0)
    assert got[3].keys() == want[3].keys()
    for name, value in got[3].items():
        assert torch.equal(value, want[3][name]), name
    assert got[3]["tokens/all"] == (mask & real).sum()


def test_the_reference_counts_no_target_of_none(batch):
    h, w, y, old, _, mask = batch
    real = torch.rand(B, L) < 0.5
    head = ek.Head(h.reshape(-1, D).double(), w.double(), y.reshape(-1))
    rest = old.reshape(-1).double(), torch.randn(B * L, dtype=torch.float64)
    want = reference.high_entropy_policy_loss(head, *rest, (mask & real).reshape(-1))
    head = replace(head, target=y.masked_fill(~real, -100).reshape(-1))
    got = reference.high_entropy_policy_loss(head, *rest, mask.reshape(-1))
    assert torch.equal(got, want)


def assert_poisoned(found):
    """An optimizer step that looks at the loss skips, and one that looks at gradients too."""
    loss, dh, dw, _ = found
    assert loss.isnan()
    assert dh.isnan().any()
    assert dw.isnan().any()


@infinities
@pytest.mark.parametrize(
    ("way", "where", "advantage"),
    # Every way with every place; an advantage of none, which could hide it, with each of both.
    [
        (way, where, float((i + j) % 2))
        for i, way in enumerate(name for name in WAYS if name != "selected")
        for j, where in enumerate(("hidden", "weight", "old_logprob"))
    ],
)
def test_a_nan_is_selected_in_every_way(batch, impl, device, way, where, advantage):
    h, w, y, old, _, mask = batch
    if where == "hidden":
        h[1, 5] = torch.nan
    elif where == "weight":
        w[77, 3] = torch.nan
    else:
        old.fill_(torch.nan)
    bad = h, w, y, old, torch.full((B,), advantage), mask
    assert_poisoned(gradients_by(impl, device, bad, WAYS[way]))


@infinities
def test_a_threshold_of_nan_selects_nothing_silently(batch, impl, device):
    found = gradients_by(impl, device, batch, {"threshold": torch.tensor(torch.nan)})
    assert_poisoned(found)
    assert found[3]["entropy/threshold"].isnan()
    none = *batch[:4], torch.zeros(B), batch[5]
    assert_poisoned(gradients_by(impl, device, none, {"threshold": torch.tensor(torch.nan)}))
    with pytest.raises(ValueError, match="threshold must be an entropy in nats; got nan"):
        gradients_by(impl, device, batch, {"threshold": float("nan")})


@infinities
@pytest.mark.parametrize("bound", [0, 1, 9])
@pytest.mark.parametrize("advantage", [None, 0.0])
def test_more_selected_tokens_than_their_bound_poison_the_gradients_where_none_looks(
    batch, impl, device, bound, advantage, monkeypatch
):
    """As on a GPU, where a ValueError would wait for their number."""
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    h, w, y, old, advantages, mask = batch
    if advantage is not None:
        advantages = torch.full((B,), advantage)
    options = {"selected": torch.arange(L).expand(B, L) < 5, "max_active_rows": bound}
    batch = h, w, y, old, advantages, mask
    if bound == 0 and impl == "cpu":
        # Its backward counts the rows on the host.
        with pytest.raises(ValueError, match="max_active_rows is 0; got gradients at 1 rows"):
            gradients_by(impl, device, batch, options)
        return
    assert_poisoned(gradients_by(impl, device, batch, options))
    fitting = gradients_by(impl, device, batch, options | {"max_active_rows": 16})
    exact = gradients_by(impl, device, batch, options | {"max_active_rows": None})
    torch.testing.assert_close(fitting[:3], exact[:3], rtol=1e-5, atol=1e-7)
