"""The collectives of selection, of the loss and of a sharded head, over a process group's ranks.

Every function is collective: each rank of `group` calls it, in the same order, also a rank that
has no token. `group=None` is this process alone and moves nothing. What moves is a few counts,
numbers of each sequence, or of a sharded head numbers of each token; masks and logits stay on their
rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ._shapes import Bool, Float, Int


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


def sum_over_ranks(
    tensor: Float[Tensor, "*shape"], group: ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """As `all_reduce_sum`, with gradient: of the sum over ranks of what is made of the result.

    Backward is an all-reduce too, so every rank of `group` runs it.
    """
    return tensor if group is None else _SumOverRanks.apply(tensor, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.group), None


def all_reduce_max(tensor: Float[Tensor, "*shape"], group: ProcessGroup) -> Float[Tensor, "*shape"]:
    """The largest of each element over the ranks of `group`, a new tensor; no NaN may be in it."""
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def gather_counts(counts: Int[Tensor, "..."], group: ProcessGroup) -> Int[Tensor, "..."]:
    """The `counts` of every rank of `group`, in the order of ranks: one dimension more.

    An all-reduce of one int64 a count and rank.
    """
    gathered = counts.new_zeros((dist.get_world_size(group), *counts.shape), dtype=torch.int64)
    gathered[dist.get_rank(group)] = counts
    return all_reduce_sum(gathered, group)


def rank_offset(count: Int[Tensor, ""], group: ProcessGroup | None) -> Int[Tensor, ""]:
    """How many items the lower ranks of `group` hold: the exclusive prefix sum of `count`.

    An all-reduce of one int64 a rank.
    """
    if group is None:
        return torch.zeros_like(count, dtype=torch.int64)
    return gather_counts(count, group)[: dist.get_rank(group)].sum()


def global_count(
    mask: Bool[Tensor, "*shape"], group: ProcessGroup | None = None
) -> Int[Tensor, ""]:
    """The number of true elements of `mask` over all ranks, int64: a loss's denominator.

    Dividing each rank's sum by it makes a sharded or accumulated loss the mean over all tokens. An
    all-reduce of one int64.
    """
    return all_reduce_sum(torch.count_nonzero(mask), group)
