"""Responses of a model with the entropy of every token, a portion at a time.

T response tokens of a portion.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from trainer.batch import Rollouts
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
    logprob_T: Tensor
    """Log-probs of the sampled tokens under the policy, nats."""
    entropy_T: Tensor
    """Entropies over the vocabulary at the sampling temperature, in nats."""


def responses(opened: Opened, engine: Engine) -> Iterator[tuple[EvaluationSet, Rollouts]]:
    """Verified responses of `engine` to the problems of each set, a portion at a time."""
    for one in opened.sets.values():
        one.verifier.start()
        for rollouts in opened.answers(engine, one):
            yield one, rollouts


def scored_responses(opened: Opened[Settings]) -> Iterator[Scored]:
    """The policy's own `responses`, scored by it."""
    config, policy = scoring(opened.settings), opened.policy
    engine = make_engine(config, policy)
    engine.update_weights(policy.weights())
    with closing(engine):
        for one, rollouts in responses(opened, engine):
            found = score(policy, rollouts, config, opened.ranks)
            yield Scored(one, rollouts, found.logprob_T, found.entropy_T)
