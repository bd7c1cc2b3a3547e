"""Logits processors for both of vLLM's model runners: one that records, and what any may build on.

Runner V1 (all of a CPU) tells a processor how the rows of its batch change. V2 (the default on a
GPU) gives each request a slot and tells which slot a row of logits belongs to. V2's calls are
tested without its runner, and have not run on a GPU. R rows of logits, V vocabulary, S slots.
"""

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from ..sampling import entropy_from_logits, truncate
from ._vllm_records import Records
from ._vllm_request import EPSILON, Asked, asked_by, check_params, temperature_of

Held = TypeVar("Held")


class RequestProcessor(ProcessorV1, ProcessorV2, Generic[Held]):
    """Follows the requests that ask for something to their places: rows in V1, slots in V2.

    V1 calls it with (config, device, pinned) and V2 with (config, states). In both it comes before
    penalties (V1) and temperature.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        self.device: torch.device = state if isinstance(state, torch.device) else state.device
        self.held: dict[int, Held] = {}
        """What those that ask for something have, by place."""
        self.changed = True
        """Whether `held` may have changed; set to True here and to False by a subclass."""

    def enter(
        self, place: int, params: SamplingParams, output_ids: list[int] | None
    ) -> Held | None:
        """What a request has that gets `place`; None where it asks for nothing.

        `output_ids` is V1's list of the response so far, which grows; None in V2.
        """
        raise NotImplementedError

    def leave(self, held: Held) -> None:
        """A request has left its place, or V2 gives that to another."""

    def is_argmax_invariant(self) -> bool:
        """No: V1 then calls it where V2 does, before any temperature, and for greedy requests."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follow the requests to their rows."""
        if batch_update is None:
            return
        self.changed = True
        for row in [*batch_update.removed, *(row for row, *_ in batch_update.added)]:
            self._put(row, None)
        for row, params, _, output_ids in batch_update.added:
            self._put(row, self.enter(row, params, output_ids))
        for source, target, direction in batch_update.moved:
            moved = self.held.pop(source, None)
            if direction == MoveDirectionality.SWAP and target in self.held:
                self.held[source] = self.held.pop(target)
            self._put(target, moved)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: whether the request of slot `req_idx` asks for something."""
        self.changed = True
        self._put(req_idx, None)
        self._put(req_idx, self.enter(req_idx, sampling_params, None))
        return req_idx in self.held

    def _put(self, place: int, held: Held | None) -> None:
        if (before := self.held.pop(place, None)) is not None:
            self.leave(before)
        if held is not None:
            self.held[place] = held


@dataclass
class _Request:
    """A request whose entropies are recorded."""

    slot: int
    asked: Asked
    cuts: bool
    temperature: float
    output_ids: list[int] | None  # V1
    start: int  # V2: the position of the first token that is sampled in this slot
    prompt: int  # V2: tokens of the prompt


class _Rows(NamedTuple):
    """Where the entropies of R rows of logits go, on the device."""

    slot_R: Tensor
    position_R: Tensor
    temperature_R: Tensor


class EntropyProcessor(RequestProcessor[_Request]):
    """Records the entropies of requests that ask for it, and cuts their logits where they ask."""

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        super().__init__(vllm_config, state, is_pin_memory)
        if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False):
            raise ValueError(
                "entropies are recorded where one rank samples all rows: "
                "enable_batch_sharded_sampling must be off; got True"
            )
        self._v2 = None if isinstance(state, torch.device) else state
        self._pinned = self.device.type == "cuda"
        slots = (
            vllm_config.scheduler_config.max_num_seqs if self._v2 is None else state.max_num_reqs
        )
        speculative = getattr(vllm_config, "speculative_config", None)
        drafts = speculative.num_speculative_tokens if speculative else 0
        self.records = Records(self.device, slots, drafts)
        self._slots = slots
        self._free = list(range(slots))  # V1
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what a request may not ask."""
        check_params(sampling_params)

    def enter(
        self, place: int, params: SamplingParams, output_ids: list[int] | None
    ) -> _Request | None:
        """A slot of the records for a request that asks."""
        if (asked := asked_by(params)) is None:
            return None
        prompt = start = 0
        if self._v2 is None:
            slot, start = self._free.pop(), len(output_ids or ())
        else:
            slot, prompt = place, int(self._v2.prompt_len.np[place])
            start = int(self._v2.prefill_len.np[place]) - prompt
        self.records.begin(slot, asked.key, start)
        cuts = asked.cuts and params.temperature >= EPSILON
        return _Request(slot, asked, cuts, temperature_of(params), output_ids, start, prompt)

    def leave(self, held: _Request) -> None:
        """Its records stay."""
        self.records.end(held.slot)
        if self._v2 is None:
            self._free.append(held.slot)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """`logits` [R, V], which change in place where sets are asked for."""
        if not self.held:
            return logits
        rows = self._rows_v1(len(logits)) if ctx is None else self._rows_v2(ctx)
        cutting = any(held.cuts for held in self.held.values())
        asking = self._asking(range(len(logits)) if ctx is None else ctx) if cutting else {}
        if len(asking) < len(logits):
            entropy_R = entropy_from_logits(logits, rows.temperature_R)
        else:
            entropy_R = rows.temperature_R.clone()
        if asking:
            self._cut(logits, rows, asking, entropy_R)
        self.records.write(entropy_R, rows.slot_R, rows.position_R)
        return logits

    def _rows_v1(self, count: int) -> _Rows:
        """Rows are requests, whose responses so far tell the positions."""
        held = [self.held.get(row) for row in range(count)]
        positions = [0 if x is None else len(x.output_ids or ()) for x in held]
        for x, position in zip(held, positions, strict=True):
            if x is not None:
                self.records.reached(x.slot, position + 1)
        if self.changed or self._table is None or len(self._table[0]) != count:
            slots = [self.records.nobody if x is None else x.slot for x in held]
            temperatures = [1.0 if x is None else x.temperature for x in held]
            self._table = self._on_device(slots), self._on_device(temperatures)
            self.changed = False
        return _Rows(self._table[0], self._on_device(positions), self._table[1])

    def _rows_v2(self, ctx: Any) -> _Rows:
        """Rows belong to slots. Those of a prompt that is not read to its end are for nobody."""
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        for slot, length in zip(ctx.idx_mapping_np.tolist(), lengths, strict=False):
            held = self.held.get(slot)
            self.records.reached(slot, length - held.prompt + 1 if held else 0)
        if self.changed or self._table is None:
            table = torch.zeros(3, self._slots, dtype=torch.int64)
            table[0] = self.records.nobody
            temperatures = [1.0] * self._slots
            for slot, x in self.held.items():
                table[:, slot] = torch.tensor([slot, x.prompt, x.start])
                temperatures[slot] = x.temperature
            self._table = table.to(self.device), self._on_device(temperatures)
            self.changed = False
        place_R = ctx.expanded_idx_mapping.long()
        slot_R, prompt_R, start_R = self._table[0][:, place_R]
        position_R = ctx.pos + 1 - prompt_R
        slot_R = slot_R.masked_fill(position_R < start_R, self.records.nobody)
        return _Rows(slot_R, position_R, self._table[1][place_R])

    def _asking(self, places: Any) -> dict[int, Asked]:
        """Rows that are to be cut; V2's places are on the device, and waited for."""
        if not isinstance(places, range):
            places = places.expanded_idx_mapping.tolist()
        held = {row: self.held.get(place) for row, place in enumerate(places)}
        return {row: x.asked for row, x in held.items() if x is not None and x.cuts}

    def _cut(
        self, logits: Tensor, rows: _Rows, asking: dict[int, Asked], entropy_R: Tensor
    ) -> None:
        """Leave the A rows of `asking` their sets in `logits`, and put entropies in `entropy_R`.

        The sets are waited for. Rows are copied where only some ask.
        """
        row_A = self._on_device(list(asking))
        found = truncate(
            logits if len(asking) == len(logits) else logits[row_A],
            rows.temperature_R[row_A],
            top_k=self._on_device([x.top_k for x in asking.values()]),
            top_p=self._on_device([float(x.top_p) for x in asking.values()]),
            min_p=self._on_device([float(x.min_p) for x in asking.values()]),
        )
        entropy_R[row_A] = found.entropy
        ids, sizes = found.support.token_ids, found.support.sizes
        row_N = row_A.repeat_interleave(sizes, output_size=len(ids))
        kept_N = logits[row_N, ids]
        logits.index_fill_(0, row_A, -torch.inf)
        logits[row_N, ids] = kept_N
        slots, positions = rows.slot_R[row_A].tolist(), rows.position_R[row_A].tolist()
        ends = found.support.offsets[1:-1].cpu().numpy()
        sets = np.split(ids.to(torch.int32).cpu().numpy(), ends)
        for slot, position, kept in zip(slots, positions, sets, strict=True):
            self.records.write_set(slot, position, kept)

    def _on_device(self, values: list[int] | list[float]) -> Tensor:
        """`values`, int64 or fp32, without waiting for them."""
        host = torch.tensor(values, pin_memory=self._pinned)
        return host.to(self.device, non_blocking=True)
