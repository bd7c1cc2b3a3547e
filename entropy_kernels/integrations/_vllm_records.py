"""Entropies and sets of requests by key, in a worker of vLLM's, until they are taken.

S slots, W positions of a response, R rows of logits, n tokens of a response. A request has a slot
while vLLM samples it. Each value stands at its token's position. So what is computed again
overwrites: a prompt read in parts, a request that is preempted and resumed, rejected drafts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from torch import Tensor

from .._shapes import Float, Int
from ..support import Support
from ._vllm_request import NAME

__all__ = ["FORGET", "NAME", "READ", "Records", "decode"]

READ, FORGET = "entropy_kernels_read", "entropy_kernels_forget"
LIMIT_BYTES = 2**33
"""On the host, of requests that have no slot and were not taken; beyond it the oldest are lost."""
WIDTH = 256
NO_SET = -1
Key = int | str


@dataclass(eq=False)
class _Record:
    """What is known of one request."""

    key: Key
    slot: int | None = None
    reach: int = 0  # as many positions may have been written
    earlier: Tensor | None = None  # fp32 [reach] on the host, from slots that it has left
    sets: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    shared: bool = False  # another request came with the same key

    @property
    def nbytes(self) -> int:
        ids = sum(ids.nbytes for ids in self.sets.values())
        return ids + (0 if self.earlier is None else self.earlier.nbytes)


class Records:
    """A table of entropies on the device, [S+1, W], whose last row is for nobody, and what left it.

    The table has 4 (S+1) W bytes. W is 256, doubled until the longest response fits. `drafts` are
    tokens that vLLM may reject in a step.
    """

    def __init__(self, device: torch.device, slots: int, drafts: int = 0):
        self.nobody = slots
        self._slack = 2 + drafts
        self._device = device
        self._table = torch.full((slots + 1, WIDTH), torch.nan, device=device)
        self._by_key: dict[Key, _Record] = {}
        self._by_slot: dict[int, _Record] = {}
        self._left: dict[int, _Record] = {}  # by slot: requests that seem to have another now
        self._idle_bytes = 0

    @torch.inference_mode()
    def begin(self, slot: int, key: Key, start: int) -> None:
        """A request has `slot` from now on, in which its response goes on at `start`."""
        self.end(slot)
        record = self._by_key.get(key)
        if record is None:
            record = self._by_key[key] = _Record(key)
        elif record.slot is None:
            self._idle_bytes -= record.nbytes
        else:  # runner V2 does not say that a request has been preempted
            old = record.slot
            self.end(old, idle=False)
            self._left[old] = record
        # A preempted request goes on where it was, but for a token or two that vLLM takes back.
        record.shared |= start + self._slack < record.reach
        record.slot = slot
        self._by_slot[slot] = record
        self._table[slot] = torch.nan

    @torch.inference_mode()
    def end(self, slot: int, idle: bool = True) -> None:
        """Whoever has `slot` leaves it, with its values."""
        self._left.pop(slot, None)
        record = self._by_slot.pop(slot, None)
        if record is None:
            return
        row = self._table[slot, : record.reach].to("cpu", non_blocking=True, copy=True)
        if record.earlier is not None:
            self._wait()
            row[: len(record.earlier)] = _filled(row, record.earlier)
        record.earlier, record.slot = row, None
        if idle:
            self._idle_bytes += record.nbytes
            self._limit()

    def reached(self, slot: int, length: int) -> None:
        """Before `write`: positions of `slot` below `length` may be written."""
        if slot in self._left:
            self._left[slot].shared = True
        if (record := self._by_slot.get(slot)) is not None:
            record.reach = max(record.reach, length)
            if length > self._table.shape[1]:
                self._widen(length)

    @torch.inference_mode()
    def write(
        self,
        entropy_R: Float[Tensor, " R"],
        slot_R: Int[Tensor, " R"],
        position_R: Int[Tensor, " R"],
    ) -> None:
        """Entropies at positions of slots; rows of nobody go to `nobody`, at any position."""
        position_R = position_R.clamp(0, self._table.shape[1] - 1)
        self._table.index_put_((slot_R, position_R), entropy_R)

    def write_set(self, slot: int, position: int, ids: npt.NDArray[np.int32]) -> None:
        """The set of one token, ids on the host."""
        if (record := self._by_slot.get(slot)) is not None:
            record.sets[position] = ids

    def read(self, keys: Sequence[Key], lengths: Sequence[int]) -> bytes:
        """The first `length` tokens of each request, NaN where nothing is known; see `decode`."""
        self._wait()
        found = [self._by_key.get(key, _Record(key)) for key in keys]
        rows = [self._entropies(record, n) for record, n in zip(found, lengths, strict=True)]
        sets = [x.sets.get(i) for x, n in zip(found, lengths, strict=True) for i in range(n)]
        empty = np.empty(0, dtype=np.int32)
        return safetensors.numpy.save(
            {
                "entropies": np.concatenate([np.empty(0, dtype=np.float32), *rows]),
                "sizes": np.array([NO_SET if x is None else len(x) for x in sets], np.int64),
                "ids": np.concatenate([empty, *(x for x in sets if x is not None)]),
                "shared": np.array([record.shared for record in found], dtype=np.uint8),
            }
        )

    def forget(self, keys: Iterable[Key] | None) -> None:
        """Drop those requests, or all; the slots of those still sampled record nothing more."""
        for key in list(self._by_key) if keys is None else keys:
            if (record := self._by_key.pop(key, None)) is None:
                continue
            if record.slot is None:
                self._idle_bytes -= record.nbytes
            else:
                del self._by_slot[record.slot]
            for slot in [slot for slot, left in self._left.items() if left is record]:
                del self._left[slot]

    def _entropies(self, record: _Record, n: int) -> npt.NDArray[np.float32]:
        values = torch.full((n,), torch.nan)
        if record.earlier is not None:
            values[: len(record.earlier)] = record.earlier[:n]
        if record.slot is not None:
            row = self._table[record.slot, : min(n, record.reach)].cpu()
            values[: len(row)] = _filled(row, values)
        return values.numpy()

    def _limit(self) -> None:
        for key, record in list(self._by_key.items()):
            if self._idle_bytes <= LIMIT_BYTES:
                return
            if record.slot is None:
                self.forget([key])

    def _widen(self, length: int) -> None:
        slots, width = self._table.shape
        while width < length:
            width *= 2
        table = torch.full((slots, width), torch.nan, device=self._device)
        table[:, : self._table.shape[1]] = self._table
        self._table = table

    def _wait(self) -> None:
        """For copies to the host."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _filled(row: Tensor, other: Tensor) -> Tensor:
    """`row`, with values of `other` where it has none, over what both have."""
    n = min(len(row), len(other))
    return torch.where(row[:n].isnan(), other[:n], row[:n])


def decode(
    answers: Sequence[bytes], keys: Sequence[Key], lengths: Sequence[int]
) -> list[tuple[Tensor, Support | None]]:
    """Entropies and sets of each request, from what the workers read of their `Records`.

    Workers of one tensor-parallel group have the same, or only the first one has any.

    Raises:
        ValueError: no worker has all; it names the keys.
    """
    problems = ["vLLM has no processor of ours; give its LLM entropy_kernels' options"]
    for answer in filter(None, answers):
        found = safetensors.numpy.load(answer)
        problems = list(_problems(found, keys, lengths))
        if not problems:
            return _split(found, lengths)
    raise ValueError(f"entropies cannot be taken: {'; '.join(problems[:4])}")


def _problems(
    found: Mapping[str, npt.NDArray[Any]], keys: Sequence[Key], lengths: Sequence[int]
) -> Iterable[str]:
    begin = 0
    for key, n, shared in zip(keys, lengths, found["shared"], strict=True):
        known = int((~np.isnan(found["entropies"][begin : begin + n])).sum())
        cut = int((found["sizes"][begin : begin + n] != NO_SET).sum())
        begin += n
        if shared:
            yield f"two requests had the key {key!r}, and each needs one of its own"
        elif known < n or cut not in (0, n):
            yield (
                f"{known} entropies and {cut} sets are known of the {n} tokens of key {key!r} "
                f"(the oldest are lost where over {LIMIT_BYTES >> 20:,} MiB wait to be taken)"
            )


def _split(
    found: Mapping[str, npt.NDArray[Any]], lengths: Sequence[int]
) -> list[tuple[Tensor, Support | None]]:
    entropies = torch.from_numpy(found["entropies"].copy())
    sizes, ids = torch.from_numpy(found["sizes"].copy()), torch.from_numpy(found["ids"].copy())
    counts = sizes.clamp_min(0)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    result: list[tuple[Tensor, Support | None]] = []
    begin = 0
    for n in lengths:
        here = slice(begin, begin + n)
        kept = None
        if n and int(sizes[begin]) != NO_SET:
            first, last = int(ends[begin]), int(ends[begin + n])
            kept = Support(ids[first:last].long(), ends[begin : begin + n + 1] - first)
        result.append((entropies[here], kept))
        begin += n
    return result
