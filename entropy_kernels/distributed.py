"""The collectives of selection and of the loss: sums of counts over the ranks of a process group.

Every function is collective: each rank of `group` calls it, in the same order, also a rank that
has no token. `group=None` is this process alone and moves nothing. What moves is a few counts;
entropies, masks and logits stay on their rank.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor
from torch.distributed import ProcessGroup


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of `tensor` over the ranks of `group`, equal on all of them.

    `tensor` has the same shape and dtype on every rank, on the device the group's backend needs
    (CUDA for NCCL). It is left as it is; the sum is a new tensor, or `tensor` itself without a
    group. No gradient flows.
    """
    if group is None:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def rank_offset(count: Int[Tensor, ""], group: ProcessGroup | None) -> Int[Tensor, ""]:
    """How many items the lower ranks of `group` hold: the exclusive prefix sum of `count`.

    An all-reduce of one int64 a rank.
    """
    if group is None:
        return torch.zeros_like(count, dtype=torch.int64)
    rank = dist.get_rank(group)
    counts = count.new_zeros(dist.get_world_size(group), dtype=torch.int64)
    counts[rank] = count
    return all_reduce_sum(counts, group)[:rank].sum()


def global_count(
    mask: Bool[Tensor, "*shape"], group: ProcessGroup | None = None
) -> Int[Tensor, ""]:
    """The number of true elements of `mask` over all ranks, int64: a loss's denominator.

    Dividing each rank's sum by it makes a sharded or accumulated loss the mean over all tokens. An
    all-reduce of one int64.
    """
    return all_reduce_sum(torch.count_nonzero(mask), group)
