"""What every engine does, in one small protocol."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Sampled(NamedTuple):
    """One response: n tokens, on the CPU."""

    tokens: Tensor  # int64 [n], end-of-sequence included where the response has ended
    logprobs: Tensor  # fp32 [n], of the distribution that was sampled from; untempered if greedy


class Engine(Protocol):
    """Samples from the policy, whose weights it is given."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[Sampled]:
        """One response to each of `prompts`, token ids; temperature 0 is greedy.

        Up to rounding, a response depends on its prompt, its seed and the weights alone: not on the
        other requests, nor on how they are batched. Equal prompts that follow one another are read
        once.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that only sampling needs, until `update_weights`."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on: every parameter, whole, by its name."""
        ...

    def close(self) -> None:
        """End all that it has started; it samples no more."""
        ...
