"""Two-temperature decoding in vLLM, for both of its model runners.

    LLM(model, logits_processors=["trainer.studies.vllm_two_temperatures:TwoTemperaturesProcessor"])
    SamplingParams(extra_args={"two_temperatures": {"threshold": 0.672, "low": 1.0, "high": 2.0}})

Runner V1 (all of a CPU) tells a processor how its batch changes; V2 (the default on a GPU) gives
each request a slot and tells which slot a row of logits belongs to. V2's calls are tested without
its runner, and have not run on a GPU. R rows of logits, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from trainer.studies.two_temperatures import TwoTemperatures, temper

NAME = "two_temperatures"
_NUMBERS = ("threshold", "low", "high")


class TwoTemperaturesProcessor(ProcessorV1, ProcessorV2):
    """Tempers the rows of requests that ask for it, before penalties and temperatures of vLLM.

    A request that asks must have temperature 1. V1 calls it with (config, device, pinned) and V2
    with (config, states).
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None):
        self._device = state if isinstance(state, torch.device) else state.device
        self._asked: dict[int, tuple[float, float, float]] = {}
        # The same on the device, by row (V1) or slot (V2); made anew when a request came or went.
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what a request may not ask."""
        if _asked(sampling_params) and sampling_params.temperature != 1:
            raise ValueError(
                "two_temperatures is in the place of the temperature, which must be 1; got "
                f"{sampling_params.temperature}"
            )

    def is_argmax_invariant(self) -> bool:
        """No: V1 then calls it where V2 does, before any temperature."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follow the requests to their rows."""
        if batch_update is None:
            return
        self._table = None
        for row in batch_update.removed:
            self._asked.pop(row, None)
        for row, parameters, *_ in batch_update.added:
            self._put(row, _asked(parameters))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._asked.pop(source, None), self._asked.pop(target, None)
            self._put(target, moved)
            if direction == MoveDirectionality.SWAP:
                self._put(source, replaced)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: whether the request of slot `req_idx` asks for two temperatures."""
        self._table = None
        self._put(req_idx, _asked(sampling_params))
        return req_idx in self._asked

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """`logits` [R, V], those rows tempered that ask for it; V2 says in `ctx` whose they are."""
        if not self._asked:
            return logits
        if self._table is None:
            self._table = self._on_device()
        asks, numbers = self._table
        if ctx is None:
            rows = torch.arange(len(logits), device=logits.device)
        else:
            rows = ctx.expanded_idx_mapping.long()
        rows = rows.clamp_max(len(asks) - 1)  # the last row of the table asks for nothing
        tempered = temper(logits, *numbers[:, rows])
        return torch.where(asks[rows].unsqueeze(1), tempered.to(logits.dtype), logits)

    def _put(self, place: int, asked: tuple[float, float, float] | None) -> None:
        if asked is None:
            self._asked.pop(place, None)
        else:
            self._asked[place] = asked

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Whether each place asks, and its three numbers; a last place asks for nothing."""
        size = max(self._asked) + 2
        asks, numbers = torch.zeros(size, dtype=torch.bool), torch.ones(3, size)
        for place, asked in self._asked.items():
            asks[place] = True
            numbers[:, place] = torch.tensor(asked)
        return asks.to(self._device), numbers.to(self._device)


def _asked(parameters: SamplingParams) -> tuple[float, float, float] | None:
    """Threshold, low and high that a request asks for; None where it does not."""
    asked = (parameters.extra_args or {}).get(NAME)
    if asked is None:
        return None
    if not isinstance(asked, dict) or set(asked) != set(_NUMBERS):
        raise ValueError(f"{NAME} needs {', '.join(_NUMBERS)}; got {asked!r}")
    checked = TwoTemperatures(**asked)
    return checked.threshold, checked.low, checked.high
