"""The exact k-th largest of fp32 values, from three histograms instead of a sort.

An fp32 orders like an unsigned 32-bit key (_torch/selection.py). Each pass counts one digit of
the key (11, 11 and 10 bits, the highest first) among the values that share the digits found so
far. It then picks the digit in which the k-th largest falls. Histograms add up over chunks and
over ranks, so neither is ever concatenated: an exact global threshold moves three histograms of
at most 2048 int64, 16 KB. The state stays on the device and nothing waits for the host.

torch.quantile stops at 2**24 elements, torch.kthvalue and a sort need all values in one tensor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_tensor
from ._torch.selection import (
    PASSES,
    SIGN,
    masked_sort_keys,
    pick_digit,
    selected_count,
    sort_keys,
    value_of_key,
)
from .backends import in_one_block
from .distributed import all_reduce_sum, rank_offset
from .ops import radix_histogram, radix_pick, select_largest, top

# The digit of the sketch: sign, exponent and the highest 10 bits of the mantissa.
SKETCH_SHIFT, SKETCH_BITS = 13, 19
LOWEST_KEY = 0x007FFFFF  # of -inf

Chunk = tuple[Tensor, Tensor | None]


class KthLargest(NamedTuple):
    """The k-th largest value over all chunks and ranks.

    value: 0-dim fp32, +inf where there is no value.
    quota: 0-dim int64, how many of those equal to `value` belong to the k largest.
    equal: 0-dim int64, how many on this rank are equal to `value`.
    """

    value: Tensor
    quota: Tensor
    equal: Tensor


def check_tokens(entropy: Tensor, mask: Tensor | None) -> None:
    """fp32 entropies, and a bool mask like them or None."""
    check_tensor("entropy", entropy)
    if entropy.dtype != torch.float32:
        raise ValueError(f"entropy must be torch.float32; got {entropy.dtype}")
    if mask is not None:
        check_tensor("mask", mask, "bool", entropy, "entropy")


def flat(score: Tensor, mask: Tensor | None) -> Chunk:
    """The tokens in one dimension, contiguous and without gradient."""
    values = score.detach().reshape(-1).contiguous()
    return values, None if mask is None else mask.reshape(-1).contiguous()


def kth_largest(
    chunks: Sequence[Chunk], fraction: float, group: ProcessGroup | None, impl: str
) -> KthLargest:
    """The k-th largest of all valid values of `chunks`, on all ranks, k = ceil(fraction * n).

    chunks: at least one (values, mask): contiguous fp32 of one dimension, on one device, and the
    bool mask of the valid ones or None. Three passes over the values, three all-reduces; or one
    launch, of few values in one chunk without a group.
    """
    if group is None and len(chunks) == 1 and in_one_block(impl, chunks[0][0]):
        return KthLargest(*top(*chunks[0], fraction, False)[:3])
    prefix = torch.zeros((), dtype=torch.int64, device=chunks[0][0].device)
    remaining = None
    prefix_bits = 0
    for shift, bits in PASSES:
        local = sum_histograms(chunks, prefix, shift, bits, prefix_bits, impl)
        counts = all_reduce_sum(local, group)
        prefix, remaining, equal, value = radix_pick(
            counts, local, prefix, remaining, fraction, shift, impl
        )
        prefix_bits += bits
    assert remaining is not None
    return KthLargest(value, remaining, equal)


def select_k_largest(
    values: Tensor, mask: Tensor | None, fraction: float, group: ProcessGroup | None, impl: str
) -> Tensor:
    """Exactly the k largest of all ranks' values: bool [N], of those equal the first."""
    if group is None and in_one_block(impl, values):
        return top(values, mask, fraction, True)[3]
    kth = kth_largest([(values, mask)], fraction, group, impl)
    quota = kth.quota - rank_offset(kth.equal, group)
    return select_largest(values, mask, kth.value, quota, impl)


def sketch_histogram(values: Tensor, mask: Tensor | None, impl: str) -> Tensor:
    """How many valid values share each 19 highest bits of the key: int64 [1 << 19], 4 MB."""
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    return radix_histogram(values, mask, prefix, SKETCH_SHIFT, SKETCH_BITS, 0, impl)


def sketch_kth_largest(counts: Tensor, fraction: float) -> Tensor:
    """The lower edge, 0-dim fp32, of the bin of `sketch_histogram` with the k-th largest value.

    +inf where the histogram is empty. Never below -inf, so only a bin of NaN gives NaN.
    """
    n = counts.sum()
    digit, _ = pick_digit(counts, selected_count(n, fraction))
    edge = value_of_key((digit << SKETCH_SHIFT).clamp_min(LOWEST_KEY))
    return torch.where(n > 0, edge, torch.inf)


def sketch_count_at_least(counts: Tensor, edge: Tensor) -> Tensor:
    """How many values of `sketch_histogram` rank at `edge`, of `sketch_kth_largest`, or above."""
    digit = (sort_keys(edge).to(torch.int64) - SIGN) >> SKETCH_SHIFT
    above = torch.arange(counts.numel(), device=counts.device) >= digit
    return torch.where(above, counts, 0).sum()


def sum_histograms(
    chunks: Sequence[Chunk], prefix: Tensor, shift: int, bits: int, prefix_bits: int, impl: str
) -> Tensor:
    """The histogram of one digit over all chunks of this rank: int64 of 1 << bits."""
    parts = [radix_histogram(*chunk, prefix, shift, bits, prefix_bits, impl) for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def select_threshold(values: Tensor, mask: Tensor | None, threshold: Tensor) -> Tensor:
    """Every valid value that ranks at `threshold` or above; NaN ranks above every number."""
    selected = values.isnan() | (values >= threshold)
    return selected if mask is None else selected & mask


def count_at_least(chunks: Sequence[Chunk], threshold: Tensor) -> Tensor:
    """How many valid values of `chunks` rank at `threshold` or above: 0-dim int64."""
    count = torch.zeros((), dtype=torch.int64, device=threshold.device)
    for values, mask in chunks:
        count = count + torch.count_nonzero(select_threshold(values, mask, threshold))
    return count


def select_largest_of_rows(
    score_BL: Tensor, mask_BL: Tensor | None, fraction: float, ties: str
) -> Tensor:
    """The selection in each row, by a sort of keys in which the masked tokens come last."""
    if score_BL.numel() == 0:
        return torch.zeros_like(score_BL, dtype=torch.bool)
    valid_BL = torch.ones_like(score_BL, dtype=torch.bool) if mask_BL is None else mask_BL
    k_B1 = selected_count(valid_BL.sum(1, keepdim=True), fraction)
    key_BL = masked_sort_keys(score_BL, mask_BL)
    sorted_BL = key_BL.sort(dim=1, descending=True).values
    threshold_B1 = sorted_BL.gather(1, (k_B1 - 1).clamp_min(0))
    above_BL = key_BL > threshold_B1
    equal_BL = valid_BL & (key_BL == threshold_B1)
    if ties == "threshold":
        return above_BL | equal_BL
    quota_B1 = k_B1 - above_BL.sum(1, keepdim=True)
    return above_BL | (equal_BL & (equal_BL.cumsum(1) <= quota_B1))
