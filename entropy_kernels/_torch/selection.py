"""Selection of the largest values on any device, by plain torch: the radix ops' bodies and keys.

An fp32 orders like the unsigned 32-bit key

    key(x) = u ^ (0xFFFFFFFF if x < 0 else 0x80000000),   u = bits(x + 0.0)

with -0 equal to +0 and every NaN at the top (0xFFFFFFFF).
"""

import torch
from torch import Tensor

KEY_BITS = 32
SIGN = -(1 << 31)
# (shift, bits) of each digit of a key, the highest first.
PASSES = ((21, 11), (10, 11), (0, 10))
# 0.55 * 100 is 55.000000000000007 in fp64: the error of an fp64 product is below this share of it.
COUNT_SLACK = 2.0**-48
# Elements per slice: temporaries stay in the L2 cache of a CPU, and below 128 MB on a GPU.
CPU_SLICE = 1 << 18
DEVICE_SLICE = 1 << 22


def radix_histogram(
    values: Tensor, mask: Tensor | None, prefix: Tensor, shift: int, bits: int, prefix_bits: int
) -> Tensor:
    """See `ops.radix_histogram`."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    on_cpu = values.device.type == "cpu"
    count = _count_by_compaction if on_cpu else _count_by_weight
    size = CPU_SLICE if on_cpu else DEVICE_SLICE
    for start in range(0, values.numel(), size):
        part = slice(start, start + size)
        key = sort_keys(values[part]) ^ SIGN
        counted = None if mask is None else mask[part]
        if prefix_bits:
            same = ((key >> (KEY_BITS - prefix_bits)) & ((1 << prefix_bits) - 1)) == prefix
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


def radix_pick(
    counts: Tensor,
    local: Tensor,
    prefix: Tensor,
    remaining: Tensor | None,
    share: float,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.radix_pick`; `share` is the `exact_share` of its fraction."""
    n = counts.sum()
    k = _count_of(n, share) if remaining is None else remaining
    digit, remaining = pick_digit(counts, k)
    prefix = (prefix << (counts.numel().bit_length() - 1)) | digit
    value = torch.where(n > 0, value_of_key(prefix << shift), torch.inf)
    return prefix, remaining, local.gather(0, digit.reshape(1)).reshape(()), value


def select_largest(values: Tensor, mask: Tensor | None, threshold: Tensor, quota: Tensor) -> Tensor:
    """See `ops.select_largest`."""
    selected = torch.empty_like(values, dtype=torch.bool)
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
        # Compared in int32, as a quota of no dimension is.
        selected[part] = above | (equal & (seen <= quota.clamp(-1, size)))
        quota = quota - seen[-1]
    return selected


def selected_count(n: Tensor, fraction: float) -> Tensor:
    """k = ceil(fraction * n), at least 1 where n >= 1 and 0 where n = 0; int64, on n's device."""
    return _count_of(n, exact_share(fraction))


def _count_of(n: Tensor, share: float) -> Tensor:
    k = (n.to(torch.float64) * share).ceil().to(torch.int64)
    return torch.minimum(k.clamp_min(1), n)


def exact_share(fraction: float) -> float:
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


def pick_digit(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin in which the k-th largest falls, and its rank within that bin, counted from 1."""
    from_top = counts.flip(0).cumsum(0)
    digit = (counts.numel() - 1) - (from_top < k).sum()
    above = from_top.masked_fill(from_top >= k, 0).amax()
    return digit, k - above
