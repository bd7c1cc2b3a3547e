"""What every engine does, in one small protocol."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from entropy_kernels import Support
from trainer.config import NO_TRUNCATION, Truncation


class Sampled(NamedTuple):
    """One response: n tokens, on the CPU."""

    tokens: Tensor  # int64 [n], end-of-sequence included where the response has ended
    logprobs: Tensor  # fp32 [n], of the distribution that was sampled from; untempered if greedy
    entropies: Tensor  # fp32 [n], nats, of the same distribution
    kept: Support | None = None  # the ids that it had, a set per token; None: all


class Engine(Protocol):
    """Samples from the policy, whose weights it is given."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        truncation: Truncation = NO_TRUNCATION,
    ) -> list[Sampled]:
        """One response to each of `prompts`, token ids; temperature 0 is greedy.

        With `truncation` each token is drawn from what it leaves, and log-probs and entropies are
        over that. Greedy sampling ignores it.

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
