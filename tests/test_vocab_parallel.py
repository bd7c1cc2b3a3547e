"""The head with its weight's rows on two or three ranks: what one rank with all of them finds.

T tokens, D hidden, V vocabulary.
"""

import functools

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from tests.head_cases import assert_as_reference, check_statistics, dtype_of_products, make, numbers
from tests.loss_cases import policy_loss
from tests.marks import sampled
from tests.processes import meeting, results_by_rank, spawn
from tests.vocab_parallel_cases import (
    BEST,
    CASES,
    GAPS,
    MERGED,
    MISSING,
    OF_TRITON,
    case,
    losses,
    work,
)

pytestmark = sampled(0.2)

PAIRS = [
    pytest.param(
        *(impl, name),
        marks=pytest.mark.skipif(why is not None, reason=why or "here"),
        id=f"{impl}-{name}",
    )
    for impl, why in ({"torch": None} | MISSING).items()
    for name in (OF_TRITON if impl == "triton" else CASES)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    spawn(work, (folder,), nprocs=3)
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids="{}-ranks".format)
def ranks(request, folder):
    return results_by_rank(folder, request.param)


@pytest.mark.parametrize(("impl", "name"), PAIRS)
def test_shards_find_what_one_rank_finds(ranks, impl, name):
    found = [rank[impl, name] for rank in ranks]
    inputs, options, grads = case(name)
    for other in found:
        assert other["same bits"]
        # All but the gradients of this rank's weight and bias.
        assert all(map(torch.equal, other["results"][:4], found[0]["results"][:4]))
    got = found[0]["results"][:4]
    got += [torch.cat(x) for x in zip(*(rank["results"][4:] for rank in found), strict=True)]
    operands = dtype_of_products(impl, inputs[0].dtype)
    assert_as_reference(got, inputs, grads, operands=operands, **options)
    h, w, y, bias = inputs
    check_statistics(found[0]["statistics"], h, w, y, bias=bias, **options)


@pytest.mark.parametrize("best", BEST, ids=["one rank", "two ranks"])
@pytest.mark.parametrize("gap", GAPS)
def test_entropies_of_two_words_keep_their_digits(ranks, gap, best):
    s = torch.tensor(-gap, dtype=torch.float64).exp()
    entropy = s.log1p() + gap * s / (1 + s)
    for rank in ranks:
        got = rank["extremes"][gap, best]
        assert ((got.entropy.double() - entropy).abs() <= 3e-7 * entropy).all()
        assert abs(got.logprob[0].double() + s.log1p()) <= 3e-7 * s.log1p()
        assert abs(got.logprob[1].double() + s.log1p() + gap) <= 3e-7 * gap


def test_a_nan_on_one_rank_poisons_its_rows_on_all(ranks):
    for rank in ranks:
        for x in numbers(rank["extremes"]["a bad row"]):
            assert x.isnan().nonzero().flatten().tolist() == [4]
        for x in numbers(rank["extremes"]["a bad weight"]):
            assert x.isnan().all()


def test_a_shard_may_be_masked_throughout(ranks):
    h, w, y, bias = ranks[0]["masked"]["all"]
    keep, kept = bias == 0, torch.arange(9) != 5
    x, few = h.clone().requires_grad_(), w[keep].clone().requires_grad_()
    own = torch.where(kept, (keep.cumsum(0) - 1)[y], 0)
    want = ek.linear_logprob_entropy(ek.Head(x, few, own), statistics=MERGED)
    (want.logprob[kept].sum() + want.entropy.sum()).backward()
    for rank in ranks:
        found = rank["masked"]["found"]
        assert found[0][5] == -torch.inf
        torch.testing.assert_close(found[0][kept], want[0][kept].detach(), rtol=1e-5, atol=1e-6)
        assert (found[7] == -torch.inf).all(), "the mean of all logits"
        for got, wanted in zip(found[1:7], want[1:7], strict=True):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[8], want[8] & kept)
        torch.testing.assert_close(rank["masked"]["hidden"], x.grad, rtol=1e-4, atol=1e-6)
        assert all(z.isnan().all() for z in rank["masked"]["nowhere"])
    weight = torch.cat([rank["masked"]["weight"] for rank in ranks])
    torch.testing.assert_close(weight[keep], few.grad, rtol=1e-4, atol=1e-6)
    # But for the target's: its own probability is not exactly 0 there, on one rank neither.
    assert (weight[~keep & (torch.arange(len(keep)) != 25)] == 0).all()
    assert weight[25].abs().max() < 1e-30


def test_one_maximum_and_one_sum_move_forward_and_one_sum_backward(ranks):
    for rank in ranks:
        found = rank["cost"]
        sizes = 2 * len(ranks)
        assert found["forward"] == [sizes, 1024, 4 * 1024]
        assert found["backward"] == [100 * 8]
        assert found["frozen hidden"] == found["forward"]
        assert found["statistics"] == [sizes, 1024, 8 * 1024, 1024]


def test_rows_without_gradient_cost_nothing_and_no_tensor_holds_the_logits(ranks):
    for rank in ranks:
        assert rank["cost"]["products of backward"] == 3 * 100
        assert rank["cost"]["largest"] < 1 / 4


@pytest.mark.parametrize("way", ["fraction", "threshold", "selected", "main_grad"])
def test_the_loss_is_that_of_one_rank(ranks, way):
    want = losses(None, [519])[way]
    assert want["h"].abs().max() > 0
    for rank in ranks:
        got = rank["losses"][way]
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)
        close(got["loss"], want["loss"])
        close(got["metrics"], want["metrics"])
        close(got["h"], want["h"])
    close(torch.cat([rank["losses"][way]["w"] for rank in ranks]), want["w"])


def test_errors_name_what_is_wrong_on_every_rank(ranks):
    for rank in ranks:
        assert f"[0, {30 * len(ranks)})" in rank["errors"]["target"]
        assert "same tokens; got [9, 8" in rank["errors"]["tokens"]
        assert "V > 0 rows over all ranks" in rank["errors"]["no row"]


def test_combinations_without_meaning_are_refused(tmp_path):
    h, w, y = make("peaked", (9, 8, 67), torch.float32)
    with meeting(0, tmp_path, ranks=1):
        group = dist.group.WORLD
        with pytest.raises(ValueError, match=r'"reference".*vocab_group'):
            ek.linear_logprob_entropy(ek.Head(h, w, y), vocab_group=group, impl="reference")
        ones = torch.ones(9)
        with pytest.raises(ValueError, match=r'which="random".*vocab_group'):
            policy_loss(h, w, y, None, ones, ones > 0, which="random", vocab_group=group)
        alone = ek.linear_logprob_entropy(ek.Head(h, w, y), vocab_group=group)
        assert torch.equal(alone.entropy, ek.linear_logprob_entropy(ek.Head(h, w, y)).entropy)
        none = ek.linear_logprob_entropy(
            ek.Head(h[:0], w, y[:0]), vocab_group=group, keep_logits_above=0.1
        )
        assert none.entropy.shape == (0,)
