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

    "auto" takes entropies from the sampler: they only choose tokens, and do so alike. It takes
    log-probs from it too in fp32, where they are the policy's to rounding. In bf16 they are not,
    and each ratio would have the difference as a factor: the policy recomputes them there.
    docs/trainer.md has the measurement. Beside a pass that is asked for, "old" or "current"
    entropies, log-probs are recomputed as well, as in all runs before there was a choice.
    """
    algorithm = settings.algorithm
    old, entropy = algorithm.old_logprob, algorithm.entropy_source
    entropy = "sampler" if entropy == "auto" else entropy
    if old == "auto":
        exact = entropy == "sampler" and not in_bf16(settings)
        old = "sampler" if exact else "recomputed"
    return Sources(old, entropy)


def in_bf16(settings: Config) -> bool:
    """Whether the policy or the engine computes in bf16, where their log-probs differ."""
    model = settings.model
    return "bfloat16" in (model.compute_dtype or model.dtype, settings.engine.dtype)
