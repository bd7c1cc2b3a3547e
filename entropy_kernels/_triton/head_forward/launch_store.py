"""Logits of the rows of high entropy: copied by forward while they are there, found by backward.

A chunk of rows at a time, forward gives those whose entropy reaches a threshold the next places of
a buffer, in ascending order and until it is full. Backward reads the active rows at the front up to
the first that has no place, and recomputes the others. So a row without a place, because the buffer
was full or its entropy too low, costs a product, never its gradient. The counts stay on the device,
and are the same every time.

T tokens, C compact rows, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# Columns that a program copies, and at once.
COPY_V = 16384
COPY_BLOCK_V = 4096
# Recomputed rows begin at a multiple of this: their tiles, of as many rows or a part of it, are
# then not also read.
STEP = 256


class Keeping(NamedTuple):
    """Where forward keeps logits.

    above: fp32 [], the least entropy of a row that is kept, in nats.
    logits: fp32 [places, V], as the product with the bias gives them.
    places: int32 [T], the place of each row; -1 for those without.
    used: int32 [1], how many rows had that entropy so far.
    """

    above: Tensor
    logits: Tensor
    places: Tensor
    used: Tensor

    @classmethod
    def room(cls, above: Tensor | None, rows: int, count: int, vocabulary: int) -> "Keeping | None":
        """For that many of `count` rows; None without a threshold."""
        if above is None:
            return None
        on: dict[str, Any] = {"device": above.device}
        logits = torch.empty(rows, vocabulary, dtype=torch.float32, **on)
        places_T = torch.empty(count, dtype=torch.int32, **on)
        return cls(above, logits, places_T, torch.zeros(1, dtype=torch.int32, **on))

    def take(
        self, logits_TV: Tensor, start: int, entropy_T: Tensor, target_T: Tensor, ignore_index: int
    ) -> None:
        """From the rows start and on, whose logits are [rows, V]; the others are [T]."""
        (count, vocabulary), stop = logits_TV.shape, start + logits_TV.shape[0]
        places = self.places[start:stop]
        place_rows[(1,)](
            entropy_T[start:stop],
            target_T[start:stop],
            self.above,
            self.used,
            places,
            count,
            self.logits.shape[0],
            ignore_index,
            BLOCK=BLOCK,
            num_warps=4,
        )
        copy_rows[(count * triton.cdiv(vocabulary, COPY_V),)](
            logits_TV,
            places,
            self.logits,
            vocabulary,
            COLUMNS=COPY_V,
            BLOCK_V=COPY_BLOCK_V,
            num_warps=8,
        )


class KeptRows(NamedTuple):
    """The compact rows whose logits are read: those at the front.

    place: int32 [C], where the logits of each are; of the others anything.
    number: int32 [1], how many they are, on the device.
    known: how many of them the host knows of: all, where it has waited for their number.
    """

    place: Tensor
    number: Tensor
    known: int


@triton.jit
def place_rows(
    entropy_ptr,  # [rows of the chunk], as the two others
    target_ptr,
    above_ptr,
    used_ptr,
    places_ptr,
    n,
    room,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """One program for all rows of a chunk. A NaN is not above anything."""
    above = tl.load(above_ptr)
    used = tl.load(used_ptr)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < n
        entropy = tl.load(entropy_ptr + offs, mask=inside, other=0.0)
        target = tl.load(target_ptr + offs, mask=inside, other=0)
        kept = (inside & (entropy >= above) & (target != ignore_index)).to(tl.int32)
        place = used + tl.cumsum(kept, 0) - 1
        placed = (kept != 0) & (place < room)
        tl.store(places_ptr + offs, tl.where(placed, place, -1), mask=inside)
        used += tl.sum(kept)
    tl.store(used_ptr, used)


@triton.jit
def copy_rows(
    logits_ptr,  # [rows of the chunk, V]
    places_ptr,
    out_ptr,  # [places, V]
    V,
    COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row and COLUMNS of it; those of rows without a place end at once."""
    splits = tl.cdiv(V, COLUMNS)
    row = (tl.program_id(0) // splits).to(tl.int64)
    place = tl.load(places_ptr + row).to(tl.int64)
    if place < 0:
        return
    first = tl.program_id(0) % splits * COLUMNS
    for start in range(0, COLUMNS, BLOCK_V):
        offs_v = first + start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + row * V + offs_v, mask=offs_v < V, other=0.0)
        tl.store(out_ptr + place * V + offs_v, z, mask=offs_v < V)


@triton.jit
def find_front(
    index_ptr,  # [C], row numbers
    number_ptr,
    places_ptr,  # [T]
    place_ptr,  # [C]
    front_ptr,
    capacity,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the active rows each one's place, and how many are before the first without one."""
    n = tl.minimum(tl.load(number_ptr), capacity)
    front = n
    for start in tl.range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < n
        row = tl.load(index_ptr + offs, mask=inside, other=0)
        place = tl.load(places_ptr + row, mask=inside, other=-1)
        tl.store(place_ptr + offs, place, mask=inside)
        front = tl.minimum(front, tl.min(tl.where(place < 0, offs, n)))
    tl.store(front_ptr, tl.where(front < n, front // STEP * STEP, n))


def kept_rows(index_C: Tensor, number: Tensor, places_T: Tensor) -> KeptRows:
    """Which of the rows `index_C`, of which there are `number`, are read from kept logits."""
    capacity = index_C.numel()
    found = KeptRows(torch.empty_like(index_C), torch.empty_like(number), 0)
    find_front[(1,)](
        index_C,
        number,
        places_T,
        found.place,
        found.number,
        capacity,
        STEP=STEP,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return found
