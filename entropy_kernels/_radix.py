"""The exact k-th largest of fp32 values, from three histograms instead of a sort.

An fp32 orders like the unsigned 32-bit key

    key(x) = u ^ (0xFFFFFFFF if x < 0 else 0x80000000),   u = bits(x + 0.0)

with -0 equal to +0 and every NaN at the top (0xFFFFFFFF). Each pass counts one digit of the key
(11, 11 and 10 bits, the highest first) among the values that share the digits found so far, and
picks the digit in which the k-th largest falls. Histograms add up over chunks and over ranks, so
neither is ever concatenated: an exact global threshold moves three histograms of at most 2048
int64, 16 KB. The state stays on the device and nothing waits for the host.

torch.quantile stops at 2**24 elements, torch.kthvalue and a sort need all values in one tensor.

`impl` of the ops is "auto" or one of "torch", "cpu" (the C++ extension) and "triton".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _gpu, _native
from ._ops import add_op_namespace_prefix
from .distributed import all_reduce_sum

# (shift, bits) of each digit.
PASSES = ((21, 11), (10, 11), (0, 10))
KEY_BITS = 32
SIGN = -(1 << 31)
# The digit of the sketch: sign, exponent and the highest 10 bits of the mantissa.
SKETCH_SHIFT, SKETCH_BITS = 13, 19
LOWEST_KEY = 0x007FFFFF  # of -inf
# 0.55 * 100 is 55.000000000000007 in fp64: what fp64 adds to a product is below this share of it.
COUNT_SLACK = 2.0**-48
# Elements a slice: temporaries stay in the L2 cache of a CPU, and below 128 MB on a GPU.
CPU_SLICE = 1 << 18
DEVICE_SLICE = 1 << 22

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


def selected_count(n: Tensor, fraction: float) -> Tensor:
    """k = ceil(fraction * n), at least 1 where n >= 1 and 0 where n = 0; int64, on n's device."""
    k = (n.to(torch.float64) * _exact_share(fraction)).ceil().to(torch.int64)
    return torch.minimum(k.clamp_min(1), n)


def _exact_share(fraction: float) -> float:
    """The fp64 of which n times, rounded up, is ceil(n * fraction) of the decimal `fraction`."""
    return fraction * (1 - COUNT_SLACK)


def sort_keys(values: Tensor) -> Tensor:
    """int32 that order as the fp32 `values` do: NaN on top, -0 equal to +0, never INT32_MIN."""
    bits = values.view(torch.int32)
    bits = bits.masked_fill(bits == SIGN, 0)
    return (bits ^ ((bits >> 31) & ~SIGN)).masked_fill(values.isnan(), ~SIGN)


def masked_sort_keys(values: Tensor, mask: Tensor | None) -> Tensor:
    """`sort_keys` of the valid values, and INT32_MIN, below all of them, for the others."""
    keys = sort_keys(values)
    return keys if mask is None else keys.masked_fill(~mask, SIGN)


def value_of_key(key: Tensor) -> Tensor:
    """The fp32 of an unsigned key held in an int64."""
    ordered = (key + SIGN).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & ~SIGN)).view(torch.float32)


def kth_largest(
    chunks: Sequence[Chunk], fraction: float, group: ProcessGroup | None, impl: str = "auto"
) -> KthLargest:
    """The k-th largest of all valid values of `chunks`, on all ranks, k = ceil(fraction * n).

    chunks: at least one (values, mask): contiguous fp32 of one dimension, on one device, and the
    bool mask of the valid ones or None. Three passes over the values, three all-reduces.
    """
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


def sketch_histogram(values: Tensor, mask: Tensor | None) -> Tensor:
    """How many valid values share each 19 highest bits of the key: int64 [1 << 19], 4 MB."""
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    return radix_histogram(values, mask, prefix, SKETCH_SHIFT, SKETCH_BITS, 0)


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


def pick_digit(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin in which the k-th largest falls, and its rank within that bin, counted from 1."""
    from_top = counts.flip(0).cumsum(0)
    digit = (counts.numel() - 1) - (from_top < k).sum()
    above = from_top.masked_fill(from_top >= k, 0).amax()
    return digit, k - above


def sum_histograms(
    chunks: Sequence[Chunk], prefix: Tensor, shift: int, bits: int, prefix_bits: int, impl: str
) -> Tensor:
    """The histogram of one digit over all chunks of this rank: int64 of 1 << bits."""
    parts = [radix_histogram(*chunk, prefix, shift, bits, prefix_bits, impl) for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _implementation(impl: str, device: torch.device) -> str:
    """What "auto" stands for."""
    if impl != "auto":
        return impl
    if device.type == "cpu":
        return "torch" if _native.cpu() is None else "cpu"
    return "triton" if _gpu.verified(device) else "torch"


@torch.library.custom_op(
    add_op_namespace_prefix("radix_histogram"),
    mutates_args=(),
    schema=(
        "(Tensor values, Tensor? mask, Tensor prefix, int shift, int bits, int prefix_bits,"
        " str impl='auto') -> Tensor"
    ),
)
def radix_histogram(
    values: Tensor,
    mask: Tensor | None,
    prefix: Tensor,
    shift: int,
    bits: int,
    prefix_bits: int,
    impl: str = "auto",
) -> Tensor:
    """How many valid values have each digit, among those whose key begins with `prefix`.

    values: fp32 [N]; mask: bool [N] or None; prefix: 0-dim int64, the highest `prefix_bits` of the
    key; the digit is the `bits` of the key above its lowest `shift`. Returns int64 [1 << bits].
    Integer sums: the same counts every time. Works in slices of bounded memory.
    """
    name = _implementation(impl, values.device)
    if name == "triton":
        kernels = _gpu.kernels("selection.launch")
        return kernels.radix_histogram(values, mask, prefix, shift, bits, prefix_bits)
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    on_cpu = values.device.type == "cpu"
    if name == "cpu":
        _native.radix_histogram(values, mask, int(prefix), shift, bits, prefix_bits, counts)
        return counts
    count = _count_by_compaction if on_cpu else _count_by_weight
    size = CPU_SLICE if on_cpu else DEVICE_SLICE
    for start in range(0, values.numel(), size):
        part = slice(start, start + size)
        key = sort_keys(values[part]) ^ SIGN
        counted = None if mask is None else mask[part]
        if prefix_bits:
            head = (key >> (KEY_BITS - prefix_bits)) & ((1 << prefix_bits) - 1)
            same = head == prefix
            counted = same if counted is None else same & counted
        count((key >> shift) & ((1 << bits) - 1), counted, counts)
    return counts


def _count_by_compaction(digit: Tensor, counted: Tensor | None, counts: Tensor) -> None:
    """Add to `counts` the digits that are counted; the fastest on a CPU, but its size is data."""
    if counted is not None:
        digit = digit[counted]
    counts += torch.bincount(digit, minlength=counts.numel())


def _count_by_weight(digit: Tensor, counted: Tensor | None, counts: Tensor) -> None:
    """Add to `counts` the digits that are counted, without waiting for a GPU.

    What is not counted adds 0 to its own digit: sent to one spare bin, it would serialise there.
    """
    weight = torch.ones_like(digit) if counted is None else counted
    counts.index_add_(0, digit, weight.to(torch.int64))


@radix_histogram.register_fake
def _(values, mask, prefix, shift, bits, prefix_bits, impl="auto"):
    return values.new_empty(1 << bits, dtype=torch.int64)


@torch.library.custom_op(
    add_op_namespace_prefix("radix_pick"),
    mutates_args=(),
    schema=(
        "(Tensor counts, Tensor local, Tensor prefix, Tensor? remaining, float fraction, int shift,"
        " str impl='auto') -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def radix_pick(
    counts: Tensor,
    local: Tensor,
    prefix: Tensor,
    remaining: Tensor | None,
    fraction: float,
    shift: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digit in which the k-th largest falls, of the histogram of the digit above `shift`.

    counts, local: int64 [1 << bits], the histogram over all ranks and this rank's; prefix: 0-dim
    int64, the digits found before; remaining: 0-dim int64, the rank k among the counted, or None
    for k = ceil(fraction * n) of all n counted.

    Returns 0-dim: the prefix with this digit, int64; the rank k within it, int64; the number on
    this rank that share it, int64; and the least value that does, fp32, +inf where n = 0.
    """
    if _implementation(impl, counts.device) == "triton":
        share = _exact_share(fraction)
        kernels = _gpu.kernels("selection.launch")
        return kernels.radix_pick(counts, local, prefix, remaining, share, shift)
    n = counts.sum()
    k = selected_count(n, fraction) if remaining is None else remaining
    digit, remaining = pick_digit(counts, k)
    prefix = (prefix << (counts.numel().bit_length() - 1)) | digit
    value = torch.where(n > 0, value_of_key(prefix << shift), torch.inf)
    return prefix, remaining, local.gather(0, digit.reshape(1)).reshape(()), value


@radix_pick.register_fake
def _(counts, local, prefix, remaining, fraction, shift, impl="auto"):
    found = [torch.empty_like(prefix) for _ in range(3)]
    return *found, torch.empty_like(prefix, dtype=torch.float32)


@torch.library.custom_op(
    add_op_namespace_prefix("keep_largest"),
    mutates_args=(),
    schema=(
        "(Tensor values, Tensor? mask, Tensor threshold, Tensor quota, str impl='auto') -> Tensor"
    ),
)
def keep_largest(
    values: Tensor, mask: Tensor | None, threshold: Tensor, quota: Tensor, impl: str = "auto"
) -> Tensor:
    """The valid values above `threshold` and the first `quota` of those equal to it.

    values: fp32 [N]; mask: bool [N] or None; threshold: 0-dim fp32; quota: 0-dim int64. Returns
    bool [N]. NaN equals NaN and is above every number.
    """
    if _implementation(impl, values.device) == "triton":
        return _gpu.kernels("selection.launch").select_largest(values, mask, threshold, quota)
    keep = torch.empty_like(values, dtype=torch.bool)
    size = CPU_SLICE if values.device.type == "cpu" else DEVICE_SLICE
    for start in range(0, values.numel(), size):
        part = slice(start, start + size)
        nan = values[part].isnan()
        equal = (values[part] == threshold) | (nan & threshold.isnan())
        above = (values[part] > threshold) | (nan & ~threshold.isnan())
        if mask is not None:
            equal &= mask[part]
            above &= mask[part]
        seen = equal.cumsum(0, dtype=torch.int32)
        keep[part] = above | (equal & (seen <= quota))
        quota = quota - seen[-1]
    return keep


@keep_largest.register_fake
def _(values, mask, threshold, quota, impl="auto"):
    return torch.empty_like(values, dtype=torch.bool)


def keep_threshold(values: Tensor, mask: Tensor | None, threshold: Tensor) -> Tensor:
    """Every valid value that ranks at `threshold` or above; NaN ranks above every number."""
    keep = values.isnan() | (values >= threshold)
    return keep if mask is None else keep & mask


def count_at_least(chunks: Sequence[Chunk], threshold: Tensor) -> Tensor:
    """How many valid values of `chunks` rank at `threshold` or above: 0-dim int64."""
    count = torch.zeros((), dtype=torch.int64, device=threshold.device)
    for values, mask in chunks:
        count = count + torch.count_nonzero(keep_threshold(values, mask, threshold))
    return count


def keep_largest_of_rows(
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
