"""A problem, and what a task offers: what a verifier's process needs, so nothing of torch."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One prompt and what its verifier needs to know."""

    prompt: str
    """The text the tokenizer sees, chat template included."""
    answer: Any
    """JSON-serialisable ground truth, read by the task's `reward` only."""
    templated: bool = False
    """Whether a chat template has written the prompt, special tokens included."""


class Task(Protocol):
    """A stream of problems and their verifier. An index fixes its problem, for runs to resume.

    A task whose verifier may hang or crash on a response has an attribute `verifier`. It is the
    "module:function" that gives the same verdicts and runs in processes of its own
    (`trainer.rewards.verifier`). One without is verified by `reward`, in the trainer's process. A
    task that reads answers of another form than `\\boxed` and `<answer>` has a method
    `answered(response)`, whether there is one in `response`.
    """

    name: str
    num_train: int | None
    """How many different problems there are to train on, an epoch; None: without end."""
    num_test: int
    """How many held-out problems there are; `problem("test", i)` takes i < num_test."""

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of "train" (endless) or "test" (held out, disjoint from train)."""
        ...

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 for a right answer, 0.0 for a wrong one."""
        ...
