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
from trainer.evaluation.command import engine_config, samples_of, temperature_of
from trainer.evaluation.sets import EvaluationSet
from trainer.sampling import sample
from trainer.studies.analyze.analysis import Opened
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
    """`samples` verified responses of `engine` to each problem of each set, a portion of whole
    problems at a time: about `batch_size` responses. The same settings give the same responses."""
    settings = opened.settings
    size = max(settings.batch_size // samples_of(settings), 1)
    for one in opened.sets.values():
        one.verifier.start()
        for first in range(0, len(one.problems), size):
            rollouts = sample(
                engine,
                opened.policy,
                one.verifier,
                one.problems[first : first + size],
                group_size=samples_of(settings),
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature_of(settings),
                seed=one.seed(settings.seed),
                first=first,
                ranks=opened.ranks,
            )
            yield one, rollouts


def right_shares(one: EvaluationSet, rollouts: Rollouts, samples: int) -> list[float]:
    """The share of right responses among the `samples` to each problem."""
    return one.reward.is_right(rollouts.reward_B).double().view(-1, samples).mean(1).tolist()


def scored_responses(opened: Opened) -> Iterator[Scored]:
    """The policy's own `responses`, scored by it."""
    config, policy = engine_config(opened.settings), opened.policy
    engine = make_engine(config, policy)
    engine.update_weights(policy.weights())
    with closing(engine):
        for one, rollouts in responses(opened, engine):
            found = score(policy, rollouts, config, opened.ranks)
            yield Scored(one, rollouts, found.logprob_T, found.entropy_T)
