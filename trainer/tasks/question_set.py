"""A whole data set of questions for evaluation."""

from collections.abc import Mapping
from typing import Any

from trainer.config import Data
from trainer.tasks.math_answers import math_reward
from trainer.tasks.problem import Problem
from trainer.tasks.render import pose
from trainer.tasks.sources import load_split, lookup, read_row


class QuestionSet:
    """Every row of a data set as a held-out problem, in its order; nothing to train on.

    `source` is "file:PATH" or "hub:NAME[:CONFIGURATION]", `split` one of its splits. Repeated
    questions stay: a benchmark is what it is. Several answers, such as the roots of an equation,
    are right together. Raises ValueError for a source that cannot be read or is empty, and for a
    row without a question or an answer.
    """

    verifier = "trainer.tasks.math_answers:math_verifier"
    num_train: int | None = 0

    def __init__(self, name: str, source: str, split: str, data: Data, tokenizer: Any):
        self.name = name
        rows = load_split(source, split)
        self._problems = [
            _problem(source, rows, number, row, data, tokenizer) for number, row in enumerate(rows)
        ]
        self.questions = [lookup(row, data.prompt_field) for row in rows]
        """The questions as the rows have them, to be found among the prompts of training."""
        self.num_test = len(self._problems)
        if not self._problems:
            raise ValueError(f"{source} is empty")

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of "test"."""
        if split != "test":
            raise ValueError(f"{self.name} is for evaluation: it has no split {split!r}")
        return self._problems[index]

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 for a right answer, 0.0 for a wrong one, as `math_reward` tells."""
        return math_reward(problem.answer, response)


def _problem(
    source: str, rows: Any, number: int, row: Mapping[str, Any], data: Data, tokenizer: Any
) -> Problem:
    """The problem of one row."""
    prompt, answer = read_row(source, rows, number, row, data.prompt_field, data.answer_field)
    return pose(tokenizer, prompt, answer, data)
