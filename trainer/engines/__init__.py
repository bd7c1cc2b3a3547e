"""Who samples the responses: one small protocol, and an engine for each library."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.config import Config
from trainer.policy import Policy
from trainer.studies.two_temperatures import TwoTemperatures


class Sampled(NamedTuple):
    """One response: n tokens, on the CPU."""

    tokens: Tensor  # int64 [n], end-of-sequence included where the response has ended
    logprobs: Tensor  # fp32 [n], of the distribution that was sampled from; untempered if greedy


class Engine(Protocol):
    """Samples from the policy, whose weights it is given."""

    two_temperatures: TwoTemperatures | None
    """If set, requests at temperature 1 are sampled with these instead, and log-probs are those of
    the distribution that they give. Whether there are any is said to `make_engine`."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[Sampled]:
        """One response to each of `prompts`, token ids; temperature 0 is greedy.

        A response depends on its prompt, its seed and the weights, and but for rounding on nothing
        else: not on the other requests, nor on how they are batched. Equal prompts that follow one
        another are read once.
        """
        ...

    def sleep(self) -> None:
        """Give back what only sampling needs, until `update_weights`."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on: every parameter by its name, whole."""
        ...

    def close(self) -> None:
        """End what it has started; it samples no more."""
        ...


def check_temperature(engine: Engine, temperature: float) -> None:
    """Raise ValueError where two temperatures would come on top of a third."""
    if engine.two_temperatures is not None and temperature != 1:
        raise ValueError(
            f"two temperatures are in the place of one, which must be 1; got {temperature}"
        )


def make_engine(
    settings: Config,
    policy: Policy,
    device: torch.device | None = None,
    copy_in: torch.dtype | None = None,
    two_temperatures: TwoTemperatures | None = None,
) -> Engine:
    """The engine that `settings.engine` names. Before it samples it needs `update_weights`, but for
    transformers' that shares the model of `policy`.

    `device` is the one the policy will train on, if it is not there yet; `copy_in` the dtype of
    the weights of transformers' engine, where it cannot share those of `policy`.
    """
    if settings.engine.kind == "vllm":
        from trainer.engines.vllm import VllmEngine

        return VllmEngine(policy, settings, device or policy.device, two_temperatures)
    from trainer.engines.transformers import TransformersEngine

    size = settings.rollout.batch_size
    return TransformersEngine(policy, size, copy_in, device, two_temperatures)
