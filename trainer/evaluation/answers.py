"""Responses of an engine to the problems of a set, a portion at a time."""

from collections.abc import Iterator

from trainer.batch import Rollouts
from trainer.config import Truncation
from trainer.engines.engine import Engine
from trainer.evaluation.sets import EvaluationSet
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.sampling import sample


def answers(
    one: EvaluationSet,
    engine: Engine,
    policy: Policy,
    ranks: Ranks,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    truncation: Truncation,
    at_once: int,
    seed: int = 0,
    first: int = 0,
) -> Iterator[Rollouts]:
    """`samples` verified responses to each problem of `one` from number `first` on.

    A portion of whole problems comes at a time, about `at_once` responses. The same settings
    give the same responses.
    """
    size = max(at_once // samples, 1)
    for start in range(first, len(one.problems), size):
        yield sample(
            engine,
            policy,
            one.verifier,
            one.problems[start : start + size],
            group_size=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            truncation=truncation,
            seed=one.seed(seed),
            first=start,
            ranks=ranks,
        )
