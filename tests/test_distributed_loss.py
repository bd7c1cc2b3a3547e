"""Sharding changes nothing: the gradient of two and three ranks together is that of one process.

The selection is exact over the ranks of a group, the denominator is the global count, and
gradients are summed.
"""

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from entropy_kernels import distributed
from entropy_kernels.testing import peaked_head
from tests.loss_cases import policy_loss
from tests.processes import spawn

D, V, L = 24, 519, 25
# Sequences of each rank: one of them has none.
SHARES = {2: [5, 1], 3: [2, 0, 4]}
CASES = {
    "selected": {"denominator": "selected"},
    "all": {"denominator": "all"},
    "grpo": {"loss_type": "grpo"},
}


def batch():
    """Six ragged sequences, with ratios around 1 and advantages of both signs."""
    generator = torch.Generator().manual_seed(3)
    h, w, y = peaked_head(6 * L, D, V)
    h, y = h.reshape(6, L, D), y.reshape(6, L)
    mask = torch.arange(L) < torch.tensor([25, 3, 14, 25, 8, 20])[:, None]
    noise = 0.1 * torch.randn(6, L, generator=generator)
    old = (ek.linear_logprob_entropy(ek.Head(h, w, y)).logprob + noise).clamp_max(0)
    return w, [h, y, old, torch.randn(6, generator=generator), mask]


def gradient(w, tensors, group, options):
    """The gradient of the weight on this rank's sequences; its share of the step's."""
    h, y, old, advantage, mask = tensors
    w = w.clone().requires_grad_()
    entropy = ek.linear_logprob_entropy(ek.Head(h, w.detach(), y)).entropy
    selected = ek.top_entropy_mask(entropy, mask, group=group)
    options = dict(options)
    if options.get("loss_type") == "grpo":
        options["num_sequences"] = distributed.global_count(mask.any(1), group)
    else:
        counted = selected if options["denominator"] == "selected" else mask
        options["denominator"] = distributed.global_count(counted, group)
    loss, metrics = policy_loss(h, w, y, old, advantage, mask, selected=selected, **options)
    loss.backward()
    by_call, counts = policy_loss(h, w.detach(), y, old, advantage, mask, group=group, **options)
    torch.testing.assert_close(by_call, loss.detach(), rtol=1e-6, atol=1e-7)
    assert counts["tokens/selected"] == metrics["tokens/selected"]
    return w.grad


def work(rank, folder, shares):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(shares))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(shares))
    try:
        w, tensors = batch()
        mine = [x.split(shares)[rank] for x in tensors]
        group = dist.group.WORLD
        total = {}
        for name, options in CASES.items():
            total[name] = gradient(w, mine, group, options)
            dist.all_reduce(total[name], group=group)
        torch.save(total, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", SHARES)
def test_sharding_gives_the_gradient_of_one_batch(ranks, tmp_path):
    spawn(work, args=(str(tmp_path), SHARES[ranks]), nprocs=ranks)
    w, tensors = batch()
    for name, options in CASES.items():
        want = gradient(w, tensors, None, options)
        assert want.abs().max() > 0
        for rank in range(ranks):
            got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
