"""Responses of a model with the entropy of every token, a portion at a time.

B sequences of a portion, L response width.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from trainer.engines import make_engine
from trainer.evaluation import Asked, Evaluation, engine_config
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.rewards.verifier import Verifier
from trainer.rollout import sample
from trainer.tasks.split import stable_hash
from trainer.types import Rollouts
from trainer.update import score


class Scored(NamedTuple):
    """Responses to some problems of one set."""

    data: str
    """The set's short name."""
    rollouts: Rollouts
    logprob_BL: Tensor
    """Of the sampled tokens under `policy`, 0 where there is none."""
    entropy_BL: Tensor
    """Of the whole vocabulary at the temperature of sampling, nats; 0 where there is no token."""


def scored_responses(
    settings: Evaluation, policy: Policy, asked: Asked, ranks: Ranks
) -> Iterator[Scored]:
    """`settings.samples` verified responses to each problem of `asked`, scored by `policy`.

    At most about `settings.batch_size` responses are held at once. The same settings give the same
    responses.
    """
    if settings.temperature == 0:
        raise ValueError("entropies are those of a temperature > 0; got temperature 0")
    config = engine_config(settings)
    engine = make_engine(config, policy)
    engine.update_weights(policy.weights())
    size = max(settings.batch_size // settings.samples, 1)
    with closing(engine):
        for name, (task, problems) in asked.items():
            verifier = Verifier(task, config.reward)
            verifier.start()
            with closing(verifier):
                for first in range(0, len(problems), size):
                    rollouts = sample(
                        engine,
                        policy,
                        verifier,
                        problems[first : first + size],
                        group_size=settings.samples,
                        max_new_tokens=settings.max_new_tokens,
                        temperature=settings.temperature,
                        seed=stable_hash(f"{settings.seed}/{name}"),
                        first=first,
                        ranks=ranks,
                    )
                    logprob_BL, entropy_BL, _, _ = score(policy, rollouts, config, ranks)
                    yield Scored(name, rollouts, logprob_BL, entropy_BL)
