"""Which sequences each rank reads in which micro-batch: as many tokens for all, within a budget."""

import heapq
from collections.abc import Sequence


def partition(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """The numbers of the sequences of each rank in each micro-batch: [micro-batch][rank].

    Every rank has the same number of micro-batches, of `budget` tokens or one longer sequence at
    most; some may be empty. As few as fit when each sequence, the longest first, goes where there
    are the fewest tokens; those of one micro-batch hold about as many. It depends on nothing but
    the arguments.
    """
    longest_first = sorted(range(len(lengths)), key=lambda b: (-lengths[b], b))
    most = max(budget, *lengths, 1)
    count = max(1, -(-sum(lengths) // (ranks * most)))
    while True:
        parts = _spread(longest_first, lengths, ranks * count)
        if sum(lengths[b] for b in parts[0]) <= most:
            break
        count += 1
    return [parts[start : start + ranks] for start in range(0, len(parts), ranks)]


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` parts, those of the most tokens first, each in the order of the numbers."""
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, part) for part in range(count)]
    for b in order:
        tokens, part = heapq.heappop(heap)
        parts[part].append(b)
        heapq.heappush(heap, (tokens + lengths[b], part))
    full = sorted(heap, key=lambda entry: (-entry[0], entry[1]))
    return [sorted(parts[part]) for _, part in full]
