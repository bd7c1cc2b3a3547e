"""Responses of a model with the entropy of every token, a portion at a time.

T response tokens of a portion.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from trainer.batch import Rollouts
from trainer.config.sources import in_bf16
from trainer.engines import make_engine
from trainer.engines.engine import Engine
from trainer.evaluation.command import Opened
from trainer.evaluation.sets import EvaluationSet
from trainer.studies.analyze.analysis import Settings, scoring
from trainer.update import score


class Scored(NamedTuple):
    """Responses to some problems of one set."""

    asked: EvaluationSet
    rollouts: Rollouts
    entropy_T: Tensor
    """The policy's entropies at the sampling temperature, in nats."""


def responses(opened: Opened, engine: Engine) -> Iterator[tuple[EvaluationSet, Rollouts]]:
    """Verified responses of `engine` to the problems of each set, a portion at a time."""
    for one in opened.sets.values():
        one.verifier.start()
        for rollouts in opened.answers(engine, one):
            yield one, rollouts


def own_responses(opened: Opened[Settings]) -> Iterator[tuple[EvaluationSet, Rollouts]]:
    """`responses` of the policy itself."""
    policy = opened.policy
    engine = make_engine(scoring(opened.settings), policy)
    engine.update_weights(policy.weights())
    with closing(engine):
        yield from responses(opened, engine)


def scored_responses(opened: Opened[Settings]) -> Iterator[Scored]:
    """The policy's own responses with its entropies.

    In fp32, from the whole vocabulary, they are those that the engine reports, which are the
    policy's to rounding. A pass scores the responses elsewhere, and where `impl` names its backend.
    """
    config, policy = scoring(opened.settings), opened.policy
    reported = not in_bf16(config) and config.rollout.truncation.off and config.model.impl == "auto"
    for one, rollouts in own_responses(opened):
        if reported:
            yield Scored(one, rollouts, rollouts.sampler_entropy_T)
        else:
            yield Scored(one, rollouts, score(policy, rollouts, config, opened.ranks).entropy_T)
