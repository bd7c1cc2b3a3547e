"""Whose log-probs and entropies a step is trained with, and so whether it scores its responses."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.run import Config


@dataclass(frozen=True)
class Sources:
    """`algorithm.old_logprob` and `algorithm.entropy_source`, with what "auto" stands for."""

    old_logprob: Literal["sampler", "recomputed"]
    entropy_source: Literal["sampler", "old", "current"]

    @property
    def score(self) -> bool:
        """Whether each step runs the scoring pass, a forward of the policy before any update."""
        return self.old_logprob == "recomputed" or self.entropy_source == "old"

    @property
    def score_selected(self) -> bool:
        """Whether the head of that pass runs on the selected tokens alone."""
        return self.old_logprob == "recomputed" and self.entropy_source == "sampler"

    @property
    def sampler_selects(self) -> bool:
        """Whether the threshold is that of the sampler's entropies."""
        return self.entropy_source == "sampler" or not self.score


def sources(settings: Config) -> Sources:
    """What a step of `settings` takes from the sampler.

    "auto" is the sampler in fp32, where it agrees with the policy, and a scoring pass in bf16. A
    source that is named decides for the other: entropies of the "old" policy need the pass, and the
    "current" policy's were always used with it.
    """
    algorithm, exact = settings.algorithm, not in_bf16(settings)
    old, entropy = algorithm.old_logprob, algorithm.entropy_source
    if entropy == "auto":
        agrees = old == "sampler" or (old == "auto" and exact)
        entropy = "sampler" if agrees else "old"
    if old == "auto":
        old = "sampler" if entropy == "sampler" and exact else "recomputed"
    return Sources(old, entropy)


def in_bf16(settings: Config) -> bool:
    """Whether the policy or the engine computes in bf16, where their log-probs differ."""
    model = settings.model
    return "bfloat16" in (model.compute_dtype or model.dtype, settings.engine.dtype)
