"""Responses of a model with the entropy of every token, a portion at a time.

B sequences of a portion, L response width.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from trainer.analyze.analysis import Opened
from trainer.engines import Engine, make_engine
from trainer.evaluation import engine_config
from trainer.rewards.verifier import Verifier
from trainer.rollout import sample
from trainer.tasks.split import stable_hash
from trainer.types import Rollouts
from trainer.update import score


class Scored(NamedTuple):
    """Responses to some problems of one set."""

    rollouts: Rollouts
    logprob_BL: Tensor
    """Of the sampled tokens under the policy, 0 where there is none."""
    entropy_BL: Tensor
    """Of the whole vocabulary at the temperature of sampling, nats; 0 where there is no token."""


def responses(opened: Opened, engine: Engine) -> Iterator[Rollouts]:
    """`samples` verified responses of `engine` to each problem, a portion of whole problems at a
    time: about `batch_size` responses. The same settings give the same responses."""
    settings = opened.settings
    size = max(settings.batch_size // settings.samples, 1)
    for name, (task, problems) in opened.asked.items():
        verifier = Verifier(task, engine_config(settings).reward)
        verifier.start()
        with closing(verifier):
            for first in range(0, len(problems), size):
                yield sample(
                    engine,
                    opened.policy,
                    verifier,
                    problems[first : first + size],
                    group_size=settings.samples,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    seed=stable_hash(f"{settings.seed}/{name}"),
                    first=first,
                    ranks=opened.ranks,
                )


def scored_responses(opened: Opened) -> Iterator[Scored]:
    """`responses` of the policy itself, scored by it."""
    config, policy = engine_config(opened.settings), opened.policy
    engine = make_engine(config, policy)
    engine.update_weights(policy.weights())
    with closing(engine):
        for rollouts in responses(opened, engine):
            logprob_BL, entropy_BL, _, _ = score(policy, rollouts, config, opened.ranks)
            yield Scored(rollouts, logprob_BL, entropy_BL)
