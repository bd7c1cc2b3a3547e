"""The collectives of selection, of the loss and of a sharded head, over a process group's ranks.

Every function is collective: each rank of `group` calls it, in the same order, also a rank that
has no token. `group=None` is this process alone and moves nothing. What moves is a few counts, a
few numbers per sequence, and for a sharded head a few per token. Masks and logits stay on their
rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_choice, check_group, check_tensor, shown
from ._shapes import Bool, Float, Int

# How the metrics of parts join, by name: these add up, take the largest or the smallest, or are
# means over the valid tokens; all others are means over the selected tokens.
_SUMS = ("loss", "tokens/all", "tokens/selected", "head/active_rows")
_LARGEST = ("ratio/max", "mismatch/max_ratio", "entropy/coefficient")
_SMALLEST = ("entropy/threshold",)
_OF_THE_MASK = ("entropy/mean", "entropy/selected_fraction")


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of `tensor` over the ranks of `group`, equal on all of them.

    `tensor` has the same shape and dtype on every rank, on the device the group's backend needs
    (CUDA for NCCL). It is left as it is; the sum is a new tensor, or `tensor` itself without a
    group. No gradient flows.
    """
    _check("tensor", tensor, group)
    if group is None:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(
    tensor: Float[Tensor, "*shape"], group: ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """`all_reduce_sum` with a gradient: the incoming gradients are summed over the ranks.

    Backward is an all-reduce too, so every rank of `group` runs it.
    """
    _check("tensor", tensor, group)
    return tensor if group is None else _SumOverRanks.apply(tensor, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.group), None


def all_reduce_max(
    tensor: Float[Tensor, "*shape"], group: ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """The largest of each element over the ranks of `group`, a new tensor; no NaN may be in it."""
    _check("tensor", tensor, group)
    largest = tensor.detach().clone()
    if group is None:
        return largest
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def all_reduce_mean(
    tensor: Float[Tensor, "*shape"] | Int[Tensor, "*shape"], group: ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """The sum of `tensor` over the ranks of `group`, divided by their number: fp64, equal on all.

    `tensor` as in `all_reduce_sum`. No gradient flows.
    """
    _check("tensor", tensor, group)
    return all_reduce_sum(tensor.detach(), group).double() / world_size(group)


def world_size(group: ProcessGroup | None) -> int:
    """The number of ranks of `group`; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def gather_counts(counts: Int[Tensor, "..."], group: ProcessGroup | None) -> Int[Tensor, "..."]:
    """The `counts` of every rank of `group`, in the order of ranks: one dimension more.

    It all-reduces one int64 per count and rank.
    """
    _check("counts", counts, group)
    return _gather(counts.to(torch.int64), group)


def _gather(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None:
        return tensor.unsqueeze(0)
    gathered = tensor.new_zeros((dist.get_world_size(group), *tensor.shape))
    gathered[dist.get_rank(group)] = tensor
    return all_reduce_sum(gathered, group)


def rank_offset(count: Int[Tensor, ""], group: ProcessGroup | None) -> Int[Tensor, ""]:
    """How many items the lower ranks of `group` hold: the exclusive prefix sum of `count`.

    It all-reduces one int64 per rank.
    """
    _check("count", count, group)
    if group is None:
        return torch.zeros_like(count, dtype=torch.int64)
    return gather_counts(count, group)[: dist.get_rank(group)].sum()


def global_count(
    mask: Bool[Tensor, "..."] | Sequence[Bool[Tensor, "..."]], group: ProcessGroup | None = None
) -> Int[Tensor, ""]:
    """The number of true elements of `mask` over all ranks, int64.

    Args:
        mask: bool of any shape, or a sequence of them, such as those of a step's micro-batches;
            at least one. A rank without a token gives an empty one.
        group: every rank calls, and one int64 is all-reduced; None is this process alone.

    The count is a loss's denominator where gradients are summed over ranks. DDP and FSDP2 average
    them, and there the denominator is `mean_count`.

    Raises:
        ValueError: no mask, or one that is not bool.
    """
    masks: list[Any] = list(mask) if isinstance(mask, list | tuple) else [mask]
    if not masks:
        raise ValueError("mask must be a bool tensor or at least one of them; got none")
    if mask is not masks[0] and not all(isinstance(each, Tensor) for each in masks):
        raise ValueError(f"mask must be a bool tensor or a list of them; got {shown(mask)}")
    for each in masks:
        check_tensor("mask", each, "bool")
    check_group("group", group)
    return all_reduce_sum(torch.stack([torch.count_nonzero(each) for each in masks]).sum(), group)


def mean_count(
    mask: Bool[Tensor, "..."] | Sequence[Bool[Tensor, "..."]], group: ProcessGroup | None = None
) -> Float[Tensor, ""]:
    """`global_count` divided by the number of ranks: a loss's denominator under DDP and FSDP2.

    They average gradients over the W ranks. With N = `global_count`, rank r's sum S_r over all of
    its micro-batches is divided by N / W. The average is then the gradient of one process on all
    tokens:

        1 / W * sum_r S_r / (N / W) = sum_r S_r / N

    It takes the arguments of `global_count` and raises the same errors. Give it the masks of all
    micro-batches of the optimizer step at once, and give the result to each of them as
    `denominator=`. The mean count of `mask.any(1)` is `num_sequences=`. Returns a 0-dim fp64, 0
    where no element is true.
    """
    return global_count(mask, group).double() / world_size(group)


def join_metrics(
    parts: Sequence[Mapping[str, Tensor]],
    group: ProcessGroup | None = None,
    *,
    kl_on: str = "selected",
    entropy_on: str = "selected",
) -> dict[str, Float[Tensor, ""]]:
    """The metrics of a whole step, from those of its micro-batches and of the ranks of `group`.

    Counts add up, ratio/max and mismatch/max_ratio are the largest, entropy/threshold is the
    lowest. entropy/mean is the mean over the valid tokens, and every other metric the mean over the
    selected tokens, however they are divided. So each equals the metric of one call on all tokens.

    Args:
        parts: what `ratio_loss` or `high_entropy_policy_loss` returned for each micro-batch of this
            rank: at least one, maybe without a token. Values of your own under other names are
            means over the selected tokens. "loss" adds up over micro-batches and is averaged over
            ranks, which gives the step's loss if denominators are the mean count per rank.
        group: every rank calls, with the same names; 8 bytes per metric and rank are all-reduced.
        kl_on, entropy_on: the loss's own options KL.on and EntropyBonus.on. They say over what
            tokens kl/reference, and entropy/of_bonus with entropy/bonus, are means.

    Returns 0-dim fp64 tensors; nothing waits for a GPU.

    Raises:
        ValueError: no part.
    """
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"parts must be a sequence of metrics, each a dict; got {shown(parts)}")
    if not parts:
        raise ValueError("parts must be the metrics of at least one micro-batch; got none")
    check_group("group", group)
    check_choice("kl_on", kl_on, ("selected", "all"))
    check_choice("entropy_on", entropy_on, ("selected", "all"))
    of_the_mask = set(_OF_THE_MASK)
    of_the_mask |= {"kl/reference"} if kl_on == "all" else set()
    of_the_mask |= {"entropy/of_bonus", "entropy/bonus"} if entropy_on == "all" else set()
    joined = _join(parts, of_the_mask)
    if group is None:
        return joined
    rows = _gather(torch.stack(list(joined.values())), group)
    joined = _join([dict(zip(joined, row, strict=True)) for row in rows], of_the_mask)
    if "loss" in joined:
        joined["loss"] = joined["loss"] / len(rows)
    return joined


def _join(parts: Sequence[Mapping[str, Tensor]], of_the_mask: set[str]) -> dict[str, Tensor]:
    columns = {name: torch.stack([p[name].detach().double() for p in parts]) for name in parts[0]}
    joined = {}
    for name, values in sorted(columns.items()):
        if name in _SUMS:
            joined[name] = values.sum()
        elif name in _LARGEST:
            joined[name] = values.amax()
        elif name in _SMALLEST:
            joined[name] = values.amin()
        else:
            counts = columns["tokens/all" if name in of_the_mask else "tokens/selected"]
            total = torch.where(counts > 0, values * counts, 0.0).sum()
            joined[name] = total / counts.sum().clamp_min(1)
    return joined


def _check(name: str, x: object, group: object) -> None:
    check_tensor(name, x)
    check_group("group", group)
