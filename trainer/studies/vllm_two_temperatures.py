"""Two-temperature decoding in vLLM, for both of its model runners.

    LLM(model, logits_processors=["trainer.studies.vllm_two_temperatures:TwoTemperaturesProcessor"])
    SamplingParams(extra_args={"two_temperatures": {"threshold": 0.672, "low": 1.0, "high": 2.0}})

R rows of logits, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams

from entropy_kernels.integrations.vllm_processors import RequestProcessor
from trainer.studies.two_temperatures import TwoTemperatures, temper

NAME = "two_temperatures"
_NUMBERS = ("threshold", "low", "high")


class TwoTemperaturesProcessor(RequestProcessor[tuple[float, float, float]]):
    """Tempers the rows of requests that ask for it, before penalties and temperatures of vLLM.

    A request that asks must have temperature 1.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None):
        super().__init__(vllm_config, state, is_pin_memory)
        # What requests ask for, by place, on the device.
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what a request may not ask."""
        if _asked(sampling_params) and sampling_params.temperature != 1:
            raise ValueError(
                "two_temperatures is in the place of the temperature, which must be 1; got "
                f"{sampling_params.temperature}"
            )

    def enter(
        self, place: int, params: SamplingParams, output_ids: list[int] | None
    ) -> tuple[float, float, float] | None:
        """Threshold, low and high."""
        return _asked(params)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """`logits` [R, V], those rows tempered that ask for it; V2 says in `ctx` whose they are."""
        if not self.held:
            return logits
        if self.changed or self._table is None:
            self._table, self.changed = self._on_device(), False
        asks, numbers = self._table
        if ctx is None:
            rows = torch.arange(len(logits), device=logits.device)
        else:
            rows = ctx.expanded_idx_mapping.long()
        rows = rows.clamp_max(len(asks) - 1)  # the last row of the table asks for nothing
        tempered = temper(logits, *numbers[:, rows])
        return torch.where(asks[rows].unsqueeze(1), tempered.to(logits.dtype), logits)

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Whether each place asks, and its three numbers; a last place asks for nothing."""
        size = max(self.held) + 2
        asks, numbers = torch.zeros(size, dtype=torch.bool), torch.ones(3, size)
        for place, asked in self.held.items():
            asks[place] = True
            numbers[:, place] = torch.tensor(asked)
        return asks.to(self.device), numbers.to(self.device)


def _asked(parameters: SamplingParams) -> tuple[float, float, float] | None:
    """Threshold, low and high that a request asks for; None where it does not."""
    asked = (parameters.extra_args or {}).get(NAME)
    if asked is None:
        return None
    if not isinstance(asked, dict) or set(asked) != set(_NUMBERS):
        raise ValueError(f"{NAME} needs {', '.join(_NUMBERS)}; got {asked!r}")
    checked = TwoTemperatures(**asked)
    return checked.threshold, checked.low, checked.high
