"""Sequences that ranks share: losses, gradients and selection are those of whole sequences.

B sequences, L tokens, D hidden, V vocabulary.
"""

import functools

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from entropy_kernels.losses import LOSSES
from entropy_kernels.testing import peaked_head
from tests.loss_cases import policy_loss, ratio_loss
from tests.processes import meeting, results_by_rank, save_by_groups, spawn

B, L, D, V = 5, 25, 16, 67
# Tokens of each sequence on each rank.
SHARES = {2: [9, 16], 3: [10, 0, 15]}


def own_loss(logprob, old_logprob, advantage, mask, sequence_group=None):
    """As GSPO without a clip; written for whole sequences, with or without a group."""
    return ek.losses.gspo(
        *(logprob, old_logprob, advantage, mask),
        clip_low=10.0,
        clip_high=10.0,
        sequence_group=sequence_group,
    )


def blind_loss(logprob, old_logprob, advantage, mask):
    return -advantage * logprob


TERMS = {"kl_coef": 0.1, "entropy_coef": 0.01, "reference_logprob": True, "entropy": True}
CASES = {name: {"loss_type": name} for name in LOSSES if name != "dr_grpo"} | {
    "dr_grpo": {"loss_type": "dr_grpo", "denominator": 64},
    "all": {"denominator": "all"},
    "a count": {"denominator": 31},
    "grpo, all": {"loss_type": "grpo", "denominator": "all"},
    "grpo, a count": {"loss_type": "grpo", "num_sequences": 9},
    "gspo, selected": {"loss_type": "gspo", "sequence_over": "selected"},
    "sapo by a function": {"loss_type": functools.partial(ek.losses.sapo, tau_neg=1.2)},
    "gmpo by a function": {"loss_type": functools.partial(ek.losses.gmpo, clip_low=0.2)},
    "own": {"loss_type": own_loss, "aggregation": "seq-mean-token-mean"},
    "terms": {"loss_type": "grpo"} | TERMS,
    "terms of all": {"loss_type": "grpo", "kl_on": "all", "entropy_on": "all"} | TERMS,
    "sequence_mask": {"correction": "sequence_mask", "sampler_logprob": True},
    "sequence_truncate": {"correction": "sequence_truncate", "sampler_logprob": True},
    "on-policy": {"loss_type": "gspo", "old_logprob": None},
}


def batch(dtype):
    """Ragged sequences, the last one empty; everything of the shape [B, L], and advantages [B]."""
    generator = torch.Generator().manual_seed(3)
    normal = functools.partial(torch.randn, B, L, generator=generator, dtype=dtype)
    logprob = -normal().square() - 2
    mask = torch.arange(L) < torch.tensor([25, 3, 14, 21, 0])[:, None]
    tensors = {
        "logprob": logprob,
        "old_logprob": logprob + 0.1 * normal(),
        "mask": mask,
        "selected": torch.rand(B, L, generator=generator) < 0.4,
        "reference_logprob": logprob + 0.3 * normal(),
        "sampler_logprob": logprob + 0.05 * normal(),
        "entropy": normal().exp(),
    }
    return tensors, torch.tensor([1.0, -1.0, 0.7, -0.4, 2.0], dtype=dtype)


def loss_of(tensors, advantage, options, **groups):
    """The loss and its metrics, and its gradients with respect to logprob and entropy."""
    given = {k: x for k, x in tensors.items() if k in BASE or k in options}
    numbers = {k: x for k, x in options.items() if k not in tensors}
    leaves = {k: given[k].clone().requires_grad_() for k in ("logprob", "entropy") if k in given}
    given |= leaves
    if options.get("old_logprob", True) is None:
        given["old_logprob"] = None
    loss, metrics = ratio_loss(advantage=advantage, **given, **numbers, **groups)
    loss.backward()
    return loss.detach(), metrics, [x.grad for x in leaves.values()]


BASE = ("logprob", "old_logprob", "mask", "selected")


def losses_of(group, shares):
    """The results of this rank's part of each sequence."""
    rank, found = dist.get_rank(group), {}
    for dtype in (torch.float64, torch.float32):
        tensors, advantage = batch(dtype)
        tensors = {name: x.split(shares, 1)[rank] for name, x in tensors.items()}
        for name, options in CASES.items():
            loss, _, grads = loss_of(tensors, advantage, options, sequence_group=group)
            found[dtype, name] = loss, grads
    return found


def selections(group, shares):
    rank, (tensors, _) = dist.get_rank(group), batch(torch.float32)
    entropy, mask = (tensors[name].split(shares, 1)[rank] for name in ("entropy", "mask"))
    streaming = ek.StreamingThreshold(group=group)
    for row in range(B):
        streaming.update(entropy[row], mask[row])
    return ek.top_entropy_mask(entropy, mask, group=group), streaming.mask(entropy, mask)


def head_loss(vocab_group, sequence_group):
    """By the head, of this rank's rows of the weight and its part of each sequence."""
    h, w, y = peaked_head(B * L, D, V)
    h, y = h.reshape(B, L, D), y.reshape(B, L)
    tensors, advantage = batch(torch.float32)
    old = ek.linear_logprob_entropy(ek.Head(h, w, y)).logprob + 0.1 * tensors["old_logprob"]
    mask = tensors["mask"]
    if vocab_group is not None:
        w = w.split([50, 17])[dist.get_rank(vocab_group)]
        part = dist.get_rank(sequence_group)
        h, y, old, mask = (x.split(SHARES[2], 1)[part] for x in (h, y, old, mask))
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss, _ = policy_loss(
        *(h, w, y, old, advantage, mask),
        fraction=0.3,
        loss_type="gspo",
        clip_low=0.1,
        clip_high=0.1,
        vocab_group=vocab_group,
        sequence_group=sequence_group,
    )
    loss.backward()
    return loss.detach(), h.grad, w.grad


def errors(group):
    tensors, advantage = batch(torch.float32)
    part = {name: x for name, x in tensors.items() if name in BASE}
    with pytest.raises(ValueError, match=r"sequence_group.*own must take it") as own:
        loss_of(part, advantage, {"loss_type": blind_loss}, sequence_group=group)
    h, w, y = peaked_head(B * L, D, V)
    rows = h.reshape(B, L, D), w, y.reshape(B, L), None, advantage, part["mask"]
    with pytest.raises(ValueError, match=r'scope="sequence".*sequence_group') as scope:
        policy_loss(*rows, scope="sequence", sequence_group=group)
    return str(own.value), str(scope.value)


def results_of(group, size):
    found = {f.__name__: f(group, SHARES[size]) for f in (losses_of, selections)}
    return found | {"errors": errors(group)}


def work(rank, folder):
    """One of four processes: groups of the first two and three, and a grid of two by two."""
    with meeting(rank, folder, ranks=4):
        save_by_groups(rank, folder, SHARES, results_of)
        vocab_groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        sequence_groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        grid = head_loss(vocab_groups[rank // 2], sequence_groups[rank % 2])
        torch.save(grid, f"{folder}/grid-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    spawn(work, (folder,), nprocs=4)
    return folder


@pytest.fixture(scope="module", params=SHARES, ids="{}-ranks".format)
def ranks(request, folder):
    return results_by_rank(folder, request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_whole_sequences(ranks, name, dtype):
    want, _, grads = loss_of(*batch(dtype), CASES[name])
    parts = [rank["losses_of"][dtype, name] for rank in ranks]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    if dtype == torch.float64:
        close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    close(sum(loss for loss, _ in parts), want)
    for got, grad in zip(zip(*(x for _, x in parts), strict=True), grads, strict=True):
        assert grad.abs().max() > 0
        close(torch.cat(got, 1), grad)


def test_selection_is_that_of_whole_sequences(ranks):
    tensors, _ = batch(torch.float32)
    want = ek.top_entropy_mask(tensors["entropy"], tensors["mask"])
    for got in zip(*(rank["selections"] for rank in ranks), strict=True):
        assert torch.equal(torch.cat(got, 1), want)


def test_what_cannot_be_exact_is_refused(ranks):
    assert all(len(rank["errors"]) == 2 for rank in ranks)


def test_vocabulary_and_sequences_divided_at_once(folder):
    want, dhidden, dweight = head_loss(None, None)
    assert dhidden.abs().max() > 0
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)
    grid = [torch.load(folder / f"grid-{rank}.pt") for rank in range(4)]
    for shard in (0, 1):
        (loss, first, _), (more, second, _) = grid[shard], grid[2 + shard]
        close(loss + more, want)
        close(torch.cat([first, second], 1), dhidden)
    close(torch.cat([grid[0][2] + grid[2][2], grid[1][2] + grid[3][2]]), dweight)
