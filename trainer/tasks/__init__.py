"""Problems and their verifiers."""

from typing import Any

from trainer.config import Data
from trainer.tasks.problem import Task


def make_task(data: Data, seed: int, tokenizer: Any = None) -> Task:
    """The task that `data.task` names; `tokenizer` is for its chat template, if it has one.

    Raises ValueError for a name of no known form, and what the task itself raises.
    """
    kind, _, name = data.task.partition(":")
    # A branch imports its own libraries: the ladder needs none of them, and some take seconds.
    if data.task == "ladder":
        from trainer.tasks.ladder import Ladder

        return Ladder(seed)
    if data.task == "ladder:long":
        from trainer.tasks.long_ladder import LongLadder

        return LongLadder(seed)
    if kind == "gym" and name:
        try:
            from trainer.tasks.gym import Gym
        except ModuleNotFoundError as error:
            raise ValueError(
                f'task {data.task!r} needs reasoning-gym: pip install -e ".[gym]" ({error})'
            ) from error
        return Gym(name, seed, data, tokenizer)
    if kind in ("file", "hub") and name:
        from trainer.tasks.prompts import PromptSet

        return PromptSet(data, seed, tokenizer)
    raise ValueError(
        f'no task {data.task!r}; wanted "ladder", "ladder:long", "gym:NAME", "file:PATH" or '
        '"hub:NAME[:CONFIGURATION]"'
    )
