"""The sets that top-k, top-p and min-p keep: against a loop in fp64, transformers and vLLM."""

import itertools
import math
from importlib.util import find_spec

import hypothesis
import pytest
import torch
from hypothesis import strategies

import entropy_kernels as ek
from entropy_kernels._torch import sampling
from tests.conftest import DEVICES

# Shares of the mass this close to top_p or min_p may fall on either side of it.
NEAR = 1e-7


def sets(truncated):
    """The ids and log-probs of each row."""
    ids, ends = truncated.support.token_ids.cpu(), truncated.support.offsets.tolist()
    pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return [(ids[at].tolist(), truncated.logprob.cpu()[at].double()) for at in pieces]


def plain(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One row by a loop in fp64, vLLM's order: its ids, and whether rounding could decide."""
    z = [x / temperature for x in logits.double().tolist()]
    most = max(z)
    near = False
    kept = []
    for i in sorted(range(len(z)), key=lambda i: (-logits[i].item(), i)):
        e = math.exp(z[i] - most)
        near = near or (0 < abs(e - min_p) < NEAR * min_p)
        if z[i] > -math.inf and e >= min_p:
            kept.append((i, e))
    kept = kept[: top_k or len(kept)]
    if top_p < 1:
        total, mass, some = sum(e for _, e in kept), 0.0, []
        for i, e in kept:
            some.append((i, e))
            mass += e
            near = near or abs(mass / total - top_p) < NEAR
            if mass >= top_p * total:
                break
        kept = some
    return [i for i, _ in kept], near


def check(logits, truncated, temperature=1.0, **limits):
    """Rows against the loop, but for those that rounding decides; log-probs and entropies too."""
    left = 0
    for r, (ids, logprob) in enumerate(sets(truncated)):
        one = {name: x[r].item() if torch.is_tensor(x) else x for name, x in limits.items()}
        heat = temperature[r].item() if torch.is_tensor(temperature) else temperature
        want, near = plain(logits[r].cpu(), heat, **one)
        if near:
            left += 1
            continue
        assert ids == want
        logp = (logits[r].cpu().double()[ids] / heat).log_softmax(0)
        torch.testing.assert_close(logprob, logp, rtol=1e-5, atol=2e-6)
        entropy = -(logp.exp() * logp).sum()
        torch.testing.assert_close(
            truncated.entropy[r].cpu().double(), entropy, rtol=1e-5, atol=2e-6
        )
    assert left <= len(logits) // 4
    truncated.support.check(len(logits), logits.device)


CASES = [
    pytest.param({}, id="off"),
    pytest.param({"top_k": 1}, id="one"),
    pytest.param({"top_k": 5}, id="five"),
    pytest.param({"top_k": 10_000}, id="more than there are"),
    pytest.param({"top_p": 0.9}, id="top-p"),
    pytest.param({"top_p": 0.9999}, id="nearly all"),
    pytest.param({"top_p": 1e-9}, id="nearly none"),
    pytest.param({"min_p": 0.05}, id="min-p"),
    pytest.param({"min_p": 1.0}, id="the most probable"),
    pytest.param({"top_k": 20, "top_p": 0.8, "min_p": 0.01}, id="all three"),
    pytest.param({"top_p": 0.95, "min_p": 0.001}, id="min-p and top-p"),
]


def rows(vocabulary, dtype):
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits *= torch.tensor([0.1, 1.0, 3.0, 10.0, 2.0, 1.0]).unsqueeze(1)
    logits[4] = logits[4].round()  # ties
    logits[5, 1::2] = -math.inf
    return logits.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", CASES)
@pytest.mark.parametrize("vocabulary", [1, 33, 1500])
def test_sets_are_those_of_a_loop_in_fp64(vocabulary, limits, dtype, device, monkeypatch):
    """Also where few candidates are looked at first, and where blocks are of some rows."""
    logits = rows(vocabulary, dtype).to(device)
    for temperature in (1.0, 0.7):
        check(logits, ek.truncate(logits, temperature, **limits), temperature, **limits)
    monkeypatch.setattr(sampling, "_FIRST", 8)
    monkeypatch.setitem(sampling._BLOCK, device, 4 * vocabulary)
    check(logits, ek.truncate(logits, **limits), **limits)


@pytest.mark.parametrize("device", DEVICES)
def test_each_row_may_have_its_own_limits(device, monkeypatch):
    monkeypatch.setattr(sampling, "_FIRST", 16)
    logits = torch.randn(40, 200, generator=torch.Generator().manual_seed(3), device="cpu") * 2
    generator = torch.Generator().manual_seed(4)
    k = torch.randint(0, 30, (40,), generator=generator)
    p = torch.rand(40, generator=generator).clamp_min(0.05)
    p[::5] = 1.0
    m = torch.rand(40, generator=generator) * 0.1
    m[::3] = 0.0
    heat = torch.rand(40, generator=generator) + 0.3
    limits = {"top_k": k.to(device), "top_p": p.to(device), "min_p": m.to(device)}
    logits, heat = logits.to(device), heat.to(device)
    check(logits, ek.truncate(logits, heat, **limits), heat, **limits)


ROW = strategies.lists(
    strategies.sampled_from([-math.inf, -3.0, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12
)


@hypothesis.given(
    row=ROW.filter(lambda row: max(row) > -math.inf),
    top_k=strategies.integers(0, 13),
    top_p=strategies.sampled_from([0.1, 0.37, 0.73, 0.97, 1.0]),
    min_p=strategies.sampled_from([0.0, 0.03, 0.3, 0.9]),
)
def test_rows_of_ties(row, top_k, top_p, min_p):
    """Equal logits are in the order of their ids; -0 equals +0."""
    logits = torch.tensor([row])
    (ids, _), *_ = sets(ek.truncate(logits, top_k=top_k, top_p=top_p, min_p=min_p))
    want, near = plain(logits[0], 1.0, top_k, top_p, min_p)
    assert near or ids == want


def test_sets_do_not_depend_on_how_many_candidates_are_looked_at(monkeypatch):
    logits = (torch.randn(20, 3000) * 3).bfloat16()
    want = ek.truncate(logits, 0.8, top_p=0.97)
    assert int(want.support.sizes.max()) > 4
    for first in (1, 4, 64):
        monkeypatch.setattr(sampling, "_FIRST", first)
        got = ek.truncate(logits, 0.8, top_p=0.97)
        assert torch.equal(got.support.token_ids, want.support.token_ids)
        assert torch.equal(got.support.offsets, want.support.offsets)
        torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("limits", [case for case in CASES if case.values[0]])
def test_transformers_warpers_keep_the_same(limits):
    """In this order. Its own is temperature, top-k, top-p, min-p: other sets where min-p joins
    another."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(30, 400, generator=torch.Generator().manual_seed(1)) * 2
    kinds = {"min_p": MinPLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    scores = logits.double() / 0.7  # their sums are in the precision of the logits
    for name, kind in kinds.items():
        if name in limits:
            scores = kind(limits[name])(None, scores)
    got = ek.truncate(logits, 0.7, **limits)
    want = ek.Support.from_mask(scores > -math.inf)
    assert [sorted(ids) for ids, _ in sets(got)] == [
        want.token_ids[a:b].tolist() for a, b in itertools.pairwise(want.offsets)
    ]


def test_transformers_own_order_differs_where_min_p_joins_top_p():
    """min-p last keeps ids that min-p first leaves to a top-p of a smaller mass."""
    from transformers import MinPLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[0.5, 0.2, 0.16, 0.07, 0.07]]).log()
    scores = MinPLogitsWarper(0.2)(None, TopPLogitsWarper(0.75)(None, logits))
    assert (scores > -math.inf).sum() == 3
    assert ek.truncate(logits, min_p=0.2, top_p=0.75).support.token_ids.tolist() == [0, 1]


def test_others_keep_all_that_equal_the_last():
    from transformers import TopKLogitsWarper

    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]])
    assert (TopKLogitsWarper(3)(None, logits) > -math.inf).sum() == 5
    assert ek.truncate(logits, top_k=3).support.token_ids.tolist() == [1, 4, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of vLLM's imports
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("limits", [case for case in CASES if case.values[0]])
def test_vllm_keeps_the_same(limits):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = torch.randn(30, 400, generator=torch.Generator().manual_seed(1)) * 2
    scores = logits.double() / 0.7  # their sums are in the precision of the logits
    if "min_p" in limits:
        p = scores.softmax(1)
        scores = scores.masked_fill(p < limits["min_p"] * p.amax(1, keepdim=True), -math.inf)
    k = torch.full((30,), min(limits["top_k"], 400)) if "top_k" in limits else None
    p = torch.full((30,), limits["top_p"], dtype=torch.float64) if "top_p" in limits else None
    scores = apply_top_k_top_p_pytorch(scores, k, p)
    want = [row.nonzero().squeeze(1).tolist() for row in scores > -math.inf]
    assert [sorted(ids) for ids, _ in sets(ek.truncate(logits, 0.7, **limits))] == want


@pytest.mark.parametrize("first", [1, 1024])
def test_a_share_that_is_reached_is_enough(first, monkeypatch):
    """Four equal ids: two have half of the mass."""
    monkeypatch.setattr(sampling, "_FIRST", first)
    logits = torch.full((1, 7), -math.inf)
    logits[0, 2:6] = 1.0
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.501, 3), (0.75, 3), (1.0, 4)):
        got = ek.truncate(logits, top_p=top_p)
        assert got.support.token_ids.tolist() == list(range(2, 2 + kept))
        assert got.entropy.tolist() == pytest.approx([math.log(kept)])


def test_the_mass_of_what_min_p_leaves_counts_beyond_the_first_candidates(monkeypatch):
    monkeypatch.setattr(sampling, "_FIRST", 8)
    logits = torch.tensor([[1.0] + [0.1] * 12 + [0.04] * 5]).log()
    # 0.52 of 2.2, not of 2.4, is 1.144.
    got = ek.truncate(logits, min_p=0.05, top_p=0.52)
    assert got.support.token_ids.tolist() == [0, 1, 2]


def test_a_set_of_one_is_certain():
    got = ek.truncate(torch.randn(5, 50), top_k=1)
    assert got.support.sizes.tolist() == [1] * 5
    assert got.logprob.tolist() == got.entropy.tolist() == [0.0] * 5


def test_a_row_without_a_distribution_shows():
    logits = torch.zeros(3, 4)
    logits[1], logits[2, 2] = -math.inf, math.nan
    got = ek.truncate(logits, top_p=0.5)
    assert got.support.sizes.tolist() == [2, 1, 1]
    assert got.logprob.isnan().tolist() == [False, False, True, True]
    assert got.entropy.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("first", [4, 1024])
def test_inf_and_nan_leave_a_set_of_one(first, value, limits, monkeypatch):
    monkeypatch.setattr(sampling, "_FIRST", first)
    logits = torch.zeros(2, 9)
    logits[1, 5] = value
    got = ek.truncate(logits, **limits)
    assert got.support.sizes[1] == 1
    assert got.logprob.isnan().nonzero().flatten().tolist() == [len(got.logprob) - 1]
    assert got.entropy.isnan().tolist() == [False, True]


def test_no_rows():
    got = ek.truncate(torch.zeros(0, 4), top_p=0.5)
    assert (got.support.offsets.tolist(), got.logprob.shape, got.entropy.shape) == ([0], (0,), (0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be a whole number >= 0, or a tensor of one per row; got -1"),
        ({"top_k": torch.tensor([1, -2])}, r"top_k must be .*got -2 at \(1,\)"),
        ({"top_p": 1.5}, r"top_p must be a number in \[0, 1\]"),
        ({"min_p": float("nan")}, r"min_p must be a number in \[0, 1\]"),
        ({"min_p": torch.tensor([0.1, 2.0])}, r"min_p must be .*got 2 at \(1,\)"),
        ({"temperature": -1.0}, "temperature must be a finite number > 0"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ek.truncate(torch.zeros(2, 3), **options)
