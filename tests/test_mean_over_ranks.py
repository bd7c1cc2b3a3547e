"""Gradients averaged over ranks, as DDP and FSDP2 do, are those of one process on all tokens.

B sequences, L tokens, D hidden, V vocabulary.
"""

import functools

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from entropy_kernels.distributed import global_count, join_metrics, mean_count
from entropy_kernels.testing import peaked_head
from tests.loss_cases import policy_loss, ratio_loss
from tests.processes import meeting, results_by_rank, save_by_groups, spawn
from tests.test_sequence_group import CASES, TERMS, B, D, L, V, batch, loss_of

# Sequences of each rank: one of them has none.
SHARES = {2: [4, 1], 3: [2, 0, 3]}
# What is left to be counted by the loss.
COUNTED = {name: options for name, options in CASES.items() if "a count" not in name}
TERMS = TERMS | {"sampler_logprob": True, "correction": "tis"}
# By which way the head's loss selects.
WAYS = {
    "fraction": {"fraction": 0.3},
    "all": {"fraction": 0.3, "denominator": "all"},
    "a count": {"fraction": 0.3, "denominator": "counted"},
    "grpo": {"fraction": 0.3, "loss_type": "grpo"},
    "sequence": {"fraction": 0.3, "scope": "sequence"},
    "threshold": {"threshold": 1.0},
    "selected": {"selected": True},
}


def rows(tensors, index):
    return {name: x[index] for name, x in tensors.items()}


def in_parts(tensors, advantage, options, group):
    """The sum over micro-batches of one sequence, by counts of the step: loss, metrics, gradients.

    A rank without a sequence has one empty micro-batch.
    """
    parts = [slice(i, i + 1) for i in range(max(len(advantage), 1))]
    mask, counted = tensors["mask"], tensors["mask"]
    if options.get("denominator") != "all":
        counted = mask & tensors["selected"]
    counts = {"denominator": mean_count([counted[i] for i in parts], group)}
    if options.get("loss_type") == "grpo":
        counts = {"num_sequences": mean_count(mask.any(1), group)}
    found = [loss_of(rows(tensors, i), advantage[i], options | counts) for i in parts]
    metrics = [m | {"loss": loss} for loss, m, _ in found]
    grads = [torch.cat(g) for g in zip(*(g for _, _, g in found), strict=True)]
    on = {name: options.get(name, "selected") for name in ("kl_on", "entropy_on")}
    return join_metrics(metrics, group, **on), grads


SPLIT = {
    "dapo": TERMS,
    "all": TERMS | {"denominator": "all", "kl_on": "all", "entropy_on": "all"},
    "grpo": TERMS | {"loss_type": "grpo"},
}


def head_loss(group, shares, options):
    """By the head: loss, and the weight's gradient, of this rank's sequences."""
    h, w, y = peaked_head(B * L, D, V)
    h, y = h.reshape(B, L, D), y.reshape(B, L)
    tensors, advantage = batch(torch.float32)
    old = ek.linear_logprob_entropy(ek.Head(h, w, y)).logprob + 0.1 * tensors["old_logprob"]
    mine = [h, y, old, advantage, tensors["mask"], tensors["selected"]]
    if group is not None:
        mine = [x.split(shares)[dist.get_rank(group)] for x in mine]
    h, y, old, advantage, mask, selected = mine
    options = options | ({"selected": selected} if "selected" in options else {})
    if options.get("denominator") == "counted":
        options["denominator"] = mean_count(mask, group)
    w = w.clone().requires_grad_()
    loss, metrics = policy_loss(h, w, y, old, advantage, mask, group=group, **options)
    loss.backward()
    return loss.detach(), join_metrics([metrics], group), w.grad


def grid_loss(options, group=None, sequence_group=None, rows_of=None, columns=None):
    tensors, advantage = batch(torch.float64)
    if group is not None:
        tensors = {name: x.split([2, 3])[rows_of] for name, x in tensors.items()}
        tensors = {name: x.split([9, 16], 1)[columns] for name, x in tensors.items()}
        advantage = advantage.split([2, 3])[rows_of]
    loss, _, grads = loss_of(
        tensors, advantage, options, group=group, sequence_group=sequence_group
    )
    return loss, grads


def results_of(group, size):
    rank, shares, found = dist.get_rank(group), SHARES[size], {}
    tensors, advantage = batch(torch.float64)
    tensors = {name: x.split(shares)[rank] for name, x in tensors.items()}
    advantage = advantage.split(shares)[rank]
    for name, options in COUNTED.items():
        loss, _, grads = loss_of(tensors, advantage, options, group=group)
        found["counted", name] = loss, grads
    for name, options in SPLIT.items():
        found["split", name] = in_parts(tensors, advantage, options, group)
    for name, options in WAYS.items():
        found["head", name] = head_loss(group, shares, options)
    found["count"] = global_count([*tensors["mask"], tensors["mask"].new_zeros(2)], group)
    return found


def work(rank, folder):
    """One of four processes: groups of the first two and three, and a grid of two by two."""
    with meeting(rank, folder, ranks=4):
        save_by_groups(rank, folder, SHARES, results_of)
        sequence_groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        place = dist.group.WORLD, sequence_groups[rank // 2], rank // 2, rank % 2
        grid = {name: grid_loss(options, *place) for name, options in COUNTED.items()}
        torch.save(grid, f"{folder}/grid-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("means")
    spawn(work, (folder,), nprocs=4)
    return folder


@pytest.fixture(params=SHARES, ids="{}-ranks".format)
def ranks(request, folder):
    return results_by_rank(folder, request.param)


exactly = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


def averaged(parts):
    """What each rank's own rows get of the average over ranks, in their order."""
    return [torch.cat(grads) / len(parts) for grads in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", COUNTED)
def test_a_group_makes_the_average_that_of_one_process(ranks, name):
    want, _, grads = loss_of(*batch(torch.float64), COUNTED[name])
    parts = [rank["counted", name] for rank in ranks]
    exactly(sum(loss for loss, _ in parts) / len(parts), want)
    for got, grad in zip(averaged([grads for _, grads in parts]), grads, strict=True):
        assert grad.abs().max() > 0
        exactly(got, grad)


@pytest.mark.parametrize("name", SPLIT)
def test_micro_batches_and_ranks_give_loss_gradient_and_metrics_of_one_call(ranks, name):
    want, metrics, grads = loss_of(*batch(torch.float64), SPLIT[name])
    parts = [rank["split", name] for rank in ranks]
    for got, grad in zip(averaged([grads for _, grads in parts]), grads, strict=True):
        exactly(got, grad)
    metrics |= {"loss": want}
    for joined, _ in parts:
        assert set(joined) == set(metrics)
        for key, value in metrics.items():
            # A share of two counts is fp32.
            rtol = 1e-7 if value.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(joined[key], value.double(), rtol=rtol, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", WAYS)
def test_the_head_s_loss_by_each_way_to_select(ranks, name):
    want, metrics, grad = head_loss(None, None, WAYS[name])
    parts = [rank["head", name] for rank in ranks]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(sum(loss for loss, _, _ in parts) / len(parts), want)
    got = sum(grad for _, _, grad in parts) / len(parts)
    close(got, grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))
    for _, joined, _ in parts:
        for key, value in metrics.items():
            close(joined[key], value, msg=key)


@pytest.mark.parametrize("name", COUNTED)
def test_sequences_shared_by_some_ranks_and_averages_over_all(folder, name):
    want, grads = grid_loss(COUNTED[name])
    grid = [torch.load(folder / f"grid-{rank}.pt")[name] for rank in range(4)]
    exactly(sum(loss for loss, _ in grid) / 4, want)
    for i, grad in enumerate(grads):
        halves = [torch.cat([grid[r][1][i], grid[r + 1][1][i]], 1) for r in (0, 2)]
        exactly(torch.cat(halves) / 4, grad)


def test_counts_of_several_masks_over_ranks(ranks):
    tensors, _ = batch(torch.float32)
    assert all(rank["count"] == tensors["mask"].sum() for rank in ranks)


def test_counts_of_one_process():
    mask = torch.tensor([[True, False], [True, True]])
    assert mean_count(mask) == 3
    assert mean_count([mask, mask[0]]) == 4
    assert mean_count(mask[:0]) == 0
    assert mean_count(mask).dtype == torch.float64


def test_less_than_one_token_per_rank_is_divided_by_as_it_is():
    logprob, ones = torch.full((1, 2), -1.0), torch.ones(1, 2)
    tensors = logprob, logprob, ones[:, 0], torch.tensor([[True, False]])
    half = torch.tensor(0.5, dtype=torch.float64)
    loss, _ = ratio_loss(*tensors, denominator=half)
    assert loss == ratio_loss(*tensors, denominator=0.5)[0] == -2
    loss, _ = ratio_loss(*tensors, loss_type="grpo", num_sequences=half)
    assert loss == -2
    none = *tensors[:3], torch.zeros(1, 2, dtype=torch.bool)
    assert ratio_loss(*none, denominator=torch.zeros(()))[0] == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments():
    with pytest.raises(ValueError, match=r"mask must be a bool tensor or at least one .* got none"):
        mean_count([])
    with pytest.raises(ValueError, match=r"mask must be a bool tensor; got torch.float32"):
        mean_count(torch.ones(3))
    with pytest.raises(ValueError, match="parts must be the metrics of at least one micro-batch"):
        join_metrics([])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "counts", [{"denominator": 7}, {"loss_type": "grpo", "num_sequences": 3}], ids=str
)
def test_a_group_with_nothing_to_count_is_refused(counts):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"group is for counts .* mean count per rank"):
        ratio_loss(x, None, x, mask, group=dist.ProcessGroup(0, 1), **counts)
    hidden, target = torch.zeros(2, 3, 4), mask.long()
    with pytest.raises(ValueError, match="group choose tokens by `fraction`; with selected="):
        policy_loss(
            *(hidden, torch.zeros(5, 4), target, None, x, mask),
            selected=mask,
            group=dist.ProcessGroup(0, 1),
            **counts,
        )
