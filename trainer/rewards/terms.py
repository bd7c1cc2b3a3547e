"""What is added to the verdict: the right form, and the punishment of overlong responses.

B sequences.
"""

import re

import torch
from torch import Tensor

from trainer.advantages import overlong_punishment
from trainer.batch import Rollouts
from trainer.config import Config, Reward
from trainer.tasks.answers import last_boxed, last_tagged
from trainer.tasks.problem import Task


def has_format(response: str, form: str) -> bool:
    """Whether `response` is of the form that `reward.format` describes."""
    if form == "boxed":
        return last_boxed(response) is not None
    if form == "answer":
        return last_tagged(response) is not None
    return re.search(form, response) is not None


def is_answered(response: str, task: Task, reward: Reward) -> bool:
    """Whether `response` has an answer in the form that the verifier reads.

    A task with a form of its own has a method `answered`. For other tasks, and where
    `reward.function` is the verifier, the forms are `reward.format`, `\\boxed` and `<answer>`.
    """
    own = getattr(task, "answered", None)
    if own is not None and not reward.function:
        return own(response)
    return any(has_format(response, form) for form in (reward.format, "boxed", "answer"))


def shaped_reward(rollouts: Rollouts, settings: Config) -> tuple[Tensor, dict[str, float]]:
    """Verdict + format_weight * form + overlong punishment [B], fp32, and the terms' means.

    Only the advantages see the terms: dynamic sampling and accuracies use the verdict, as in DAPO.
    """
    reward, shaped_B, metrics = settings.reward, rollouts.reward_B, {}
    if reward.format_weight:
        form_B = torch.tensor(
            [float(has_format(response, reward.format)) for response in rollouts.responses]
        ).to(shaped_B)
        shaped_B = shaped_B + reward.format_weight * form_B
        metrics["reward/format"] = float(form_B.mean())
    if settings.algorithm.overlong_cache:
        overlong_B = overlong_punishment(
            rollouts.response_length_B, settings.rollout.max_new_tokens, settings.algorithm
        )
        shaped_B = shaped_B + overlong_B
        metrics["reward/overlong"] = float(overlong_B.mean())
    return shaped_B, metrics
