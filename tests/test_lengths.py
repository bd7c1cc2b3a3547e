"""Ragged tokens, [T] with lengths: the losses and gradients of the same tokens in rows, [B, L].

B sequences, L their length, T tokens.
"""

import functools
import math

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _loss_tokens
from entropy_kernels.loss_terms import AGGREGATIONS, CORRECTIONS
from entropy_kernels.losses import LOSSES
from entropy_kernels.testing import peaked_head
from tests.loss_cases import gradient, grouped, make_case, policy_loss

# Sequences without a token at the ends and inside; `mask` has tokens of some sequences alone.
LENGTHS = torch.tensor([0, 9, 7, 0, 8, 4, 2, 1, 0])
EXISTS = torch.arange(9) < LENGTHS[:, None]


def own_loss(logprob, old_logprob, advantage, mask):
    """As GSPO-token without clip: it needs the tokens of a sequence in a row."""
    mean = torch.where(mask, logprob - old_logprob, 0).sum(1, True) / mask.sum(1, True).clamp_min(1)
    return -advantage * mean.exp()


COUNTS = {
    "seq-mean-token-mean": {"num_sequences": 5},
    "seq-mean-token-sum": {"num_sequences": 5},
    "seq-mean-token-sum-norm": {"num_sequences": 5, "denominator": 16},
    "token-mean": {"denominator": 31},
}
TERMS = {"kl_coef": 0.1, "entropy_coef": 0.2, "reference_logprob": 1, "entropy": 1}
CASES = (
    {name: {"loss_type": name} for name in LOSSES if name != "dr_grpo"}
    | {"dr_grpo": {"loss_type": "dr_grpo", "denominator": 16}}
    | {f"sapo, {how}": {"loss_type": "sapo", "aggregation": how} for how in AGGREGATIONS[:3]}
    | {f"dapo, {how}, counts": {"aggregation": how} | counts for how, counts in COUNTS.items()}
    | {f"{x}": {"correction": x, "correction_cap": 30.0, "sampler_logprob": 1} for x in CORRECTIONS}
    | {
        "all": {"denominator": "all"},
        "grpo, all": {"loss_type": "grpo", "denominator": "all"},
        "gspo, selected": {"loss_type": "gspo", "sequence_over": "selected", "clip_high": 9.0},
        "own": {"loss_type": own_loss},
        "a function": {"loss_type": functools.partial(ek.losses.gmpo, clip_low=0.2)},
        "terms": TERMS | {"loss_type": "grpo", "token_weight": 1},
        "terms of all": TERMS | {"loss_type": "gspo", "kl_on": "all", "entropy_on": "all"},
        "a coefficient per token": TERMS | {"loss_type": "grpo", "kl_coef": 1},
        "a range per token": {"loss_type": "grpo", "clip_low": 1, "clip_high": 1},
        "dual clip": {"loss_type": "grpo", "dual_clip": 3.0},
    }
)


def rows():
    """Tokens [B, L] with empty sequences, whose padding holds what must not be read."""
    case = make_case(empty=False)
    order = torch.tensor([0, 0, 1, 0, 2, 3, 4, 5, 0])
    fields = zip(case._fields, case, strict=True)
    found = {name: x[order] for name, x in fields}
    found["mask"] = EXISTS.clone()
    found["mask"][4:, 1] = found["mask"][7] = False
    return found


def as_ragged(tokens):
    """The same, one sequence after another."""
    return {name: x[EXISTS] if x.ndim == 2 else x for name, x in tokens.items()}


def loss_of(given, options, x):
    """The loss by tokens in rows, or one after another."""
    made = {
        "reference_logprob": given["old"] - 0.1,
        "sampler_logprob": given["old"] - 0.3 * given["advantage"].abs(),
        "token_weight": given["advantage"].abs(),
        "kl_coef": given["advantage"].abs() / 10,
        "entropy": given["advantage"].abs(),
        "clip_low": given["advantage"].abs() / 9,
        "clip_high": given["advantage"].abs() / 5,
    }
    options = {k: made[k] if v == 1 and k in made else v for k, v in options.items()}
    lengths = {} if x.ndim == 2 else {"lengths": LENGTHS}
    return ek.ratio_loss(
        x,
        given["old"],
        given["advantage"] if options.get("loss_type") != "grpo" else given["advantage_B"],
        given["mask"],
        selected=given["selected"],
        **grouped(options),
        **lengths,
    )


@pytest.mark.parametrize("name", CASES)
def test_ragged_tokens_have_the_loss_the_gradient_and_the_metrics_of_rows(name):
    tokens, options = rows(), CASES[name]
    ragged = as_ragged(tokens)
    loss, slope = gradient(tokens["logprob"], lambda x: loss_of(tokens, options, x)[0])
    got, grad = gradient(ragged["logprob"], lambda x: loss_of(ragged, options, x)[0])
    assert slope.abs().max() > 0
    torch.testing.assert_close(got, loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grad, slope[EXISTS], rtol=1e-13, atol=1e-15)
    metrics, found = (loss_of(x, options, x["logprob"])[1] for x in (tokens, ragged))
    assert found.keys() == metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "terms"])
def test_it_compiles_into_one_graph(name, unchecked_shapes):
    """There rows are T long: the longest of `lengths` would have to be waited for."""
    ragged = as_ragged(rows())

    def step(x):
        return loss_of(ragged, CASES[name], x)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    both = (gradient(ragged["logprob"], f) for f in (compiled, step))
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_no_token_is_a_zero_loss_with_zero_gradients(loss_type, lengths):
    none = torch.zeros(0)
    loss, grad = gradient(
        none,
        lambda x: ek.ratio_loss(
            *(x, none, torch.zeros(len(lengths)), none > 0),
            loss_type=loss_type,
            lengths=torch.tensor(lengths, dtype=torch.int64),
        )[0],
    )
    assert loss == 0
    assert grad.shape == (0,)


WAYS = {
    "fraction": {"fraction": 0.4},
    "sequence": {"fraction": 0.4, "scope": "sequence"},
    "threshold": {"threshold": 1.0},
    "selected": {"selected": 1},
}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gmpo"])
@pytest.mark.parametrize("way", WAYS)
def test_the_head_s_loss_takes_them_by_each_way_to_select(way, loss_type):
    B, L = EXISTS.shape
    h, w, y = peaked_head(B * L, 16, 67)
    h, y, tokens = h.reshape(B, L, 16), y.reshape(B, L), rows()
    old = tokens["old"].float().clamp(-4, 0)
    options = WAYS[way] | {"loss_type": loss_type}

    def loss(h, ragged):
        chosen = {
            k: tokens["selected"] if v == 1 and k == "selected" else v for k, v in options.items()
        }
        given = [y, old, tokens["mask"]]
        if ragged:
            given = [x[EXISTS] for x in given]
            chosen = {k: x[EXISTS] if k == "selected" else x for k, x in chosen.items()}
            chosen["lengths"] = LENGTHS
        target, old_logprob, mask = given
        advantage = tokens["advantage_B"].float()
        return policy_loss(h, w, target, old_logprob, advantage, mask, **chosen)

    got = gradient(h[EXISTS], lambda h: loss(h, True)[0])
    want = gradient(h, lambda h: loss(h, False)[0])
    assert want[1].abs().max() > 0
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], want[1][EXISTS], rtol=1e-4, atol=1e-6)
    found, metrics = loss(h[EXISTS], True)[1], loss(h, False)[1]
    for key, value in metrics.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


X, M = -torch.ones(5), torch.ones(5) > 0
BAD = {
    "a list": ({"lengths": [2, 3]}, "lengths must be a tensor; got a list"),
    "a float": ({"lengths": torch.tensor([2.0, 3.0])}, r"int64 \[B\]; got torch.float32 \(2,\)"),
    "rows": ({"lengths": torch.tensor([[2, 3]])}, r"int64 \[B\]; got torch.int64 \(1, 2\)"),
    "fewer": ({"lengths": torch.tensor([2, 2])}, "add up to logprob's 5 tokens; got 4"),
    "none": ({"lengths": torch.tensor([], dtype=torch.int64)}, "add up to .* 5 tokens; got none"),
    "negative": ({"lengths": torch.tensor([6, -1])}, "lengths must be >= 0; got -1"),
    "elsewhere": ({"lengths": torch.tensor([2, 3], device="meta")}, "on cpu or cpu; got meta"),
    "advantage": ({"advantage": torch.ones(3)}, r"\(5,\), or per sequence, \(2,\); got \(3,\)"),
    "either": (
        {"lengths": torch.tensor([2, 0, 1, 1, 1])},
        r"one per token and one per sequence: leave out .* got lengths=\[2, 0, 1, 1, 1\]",
    ),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_lengths_that_do_not_divide_the_tokens_are_refused(change, message):
    given = {"advantage": X, "lengths": torch.tensor([2, 3])} | change
    with pytest.raises(ValueError, match=message):
        ek.ratio_loss(X, X, given["advantage"], M, lengths=given["lengths"])
    if "logprob" not in message and "advantage" not in change:
        head = ek.Head(torch.zeros(5, 4), torch.zeros(7, 4), torch.zeros(5, dtype=torch.int64))
        with pytest.raises(ValueError, match=message):
            ek.high_entropy_policy_loss(head, X, given["advantage"], M, lengths=given["lengths"])


@pytest.mark.usefixtures("unchecked_shapes")
def test_tokens_in_rows_have_no_lengths():
    x = X[None]
    with pytest.raises(ValueError, match=r"with lengths, logprob must be \[T\].*got \(1, 5\)"):
        ek.ratio_loss(x, x, x, x < 0, lengths=torch.tensor([5]))


def test_sequences_of_one_token_have_either_kind_of_advantage():
    lengths = torch.ones(5, dtype=torch.int64)
    loss, _ = ek.ratio_loss(X, X, torch.arange(5.0), M, loss_type="grpo", lengths=lengths)
    assert loss == -2
    assert math.isclose(loss, ek.ratio_loss(X, X, torch.arange(5.0), M)[0], rel_tol=1e-6)


def test_an_advantage_of_two_meanings_is_nan_where_nobody_reads_the_lengths(monkeypatch):
    """As on a GPU, which would have to be waited for."""
    monkeypatch.setattr(_loss_tokens, "readable", lambda x: False)
    for lengths, wanted in ((torch.tensor([2, 0, 1, 1, 1]), math.nan), (torch.ones(5), -2.0)):
        x = X.clone().requires_grad_()
        loss, _ = ek.ratio_loss(x, X, torch.arange(5.0), M, lengths=lengths.long())
        loss.backward()
        torch.testing.assert_close(loss.item(), wanted, equal_nan=True)
        assert bool(x.grad.isnan().any()) == math.isnan(wanted)
