"""The engines of training, decoding with two temperatures in the place of one."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.config import NO_TRUNCATION, Config, Truncation
from trainer.engines.engine import Engine, Sampled
from trainer.engines.transformers import TransformersEngine
from trainer.engines.vllm import VllmEngine
from trainer.policy import Policy
from trainer.studies.two_temperatures import TwoTemperatures


class TwoTemperatureEngine(Engine, Protocol):
    """Samples with `two`, which may be replaced between requests; their own temperature is 1."""

    two: TwoTemperatures


class _AtTemperatureOne:
    """Refuses requests with a temperature of their own, which two others replace."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        truncation: Truncation = NO_TRUNCATION,
    ) -> list[Sampled]:
        """As `Engine.sample`; ValueError for another temperature than 1."""
        if temperature != 1:
            raise ValueError(f"temperature, replaced by two, must be 1; got {temperature}")
        return super().sample(  # type: ignore[misc]
            prompts,
            seeds,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            truncation=truncation,
        )


class TransformersTwoTemperatures(_AtTemperatureOne, TransformersEngine):
    """transformers' engine with two temperatures."""

    def __init__(self, policy: Policy, batch_size: int, two: TwoTemperatures):
        super().__init__(policy, batch_size)
        self.two = two

    def process(self, logits_BV: Tensor) -> Tensor:
        """The tempered logits."""
        return self.two(None, logits_BV)


class VllmTwoTemperatures(_AtTemperatureOne, VllmEngine):
    """vLLM's engine with two temperatures."""

    logits_processors = ("trainer.studies.vllm_two_temperatures:TwoTemperaturesProcessor",)

    def __init__(self, policy: Policy, config: Config, device: torch.device, two: TwoTemperatures):
        self.two = two
        super().__init__(policy, config, device)

    def extra_args(self) -> dict[str, Any]:
        """The two temperatures and their threshold, for the processor."""
        return {"two_temperatures": self.two.plain()}


def make_engine(settings: Config, policy: Policy, two: TwoTemperatures) -> TwoTemperatureEngine:
    """The engine that `settings.engine` names, decoding with `two`; see `engines.make_engine`."""
    if settings.engine.kind == "vllm":
        return VllmTwoTemperatures(policy, settings, policy.device, two)
    return TransformersTwoTemperatures(policy, settings.rollout.batch_size, two)
