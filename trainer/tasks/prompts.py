"""Prompt sets with answers, scored by math-verify: "file:PATH" and "hub:NAME[:CONFIGURATION]"."""

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from trainer.config import Data
from trainer.tasks.math_answers import math_reward
from trainer.tasks.problem import Problem
from trainer.tasks.render import pose
from trainer.tasks.sources import answer_text, digest, distinct_prompts, load_source, lookup
from trainer.tasks.split import check_index, held_out


class PromptSet:
    """A file, folder or hub data set of questions and answers.

    Held out is its "test" split, whose prompts are removed from "train"; without one it is
    `data.test_fraction` of all prompts, by hash. A repeated prompt counts once, with its first
    answer. Every epoch of training is another permutation, fixed by `seed`; the order of the
    held-out problems depends on nothing.
    Raises ValueError for a source that cannot be read, is empty, lacks a column or an answer, or
    leaves nothing to train on or to hold out.
    """

    verifier = "trainer.tasks.math_answers:math_verifier"

    def __init__(self, data: Data, seed: int, tokenizer: Any):
        self.name = data.task
        self._data = data
        self._seed = seed
        self._tokenizer = tokenizer
        self._train, test = load_source(data.task)
        fields = (data.prompt_field, data.answer_field)
        train_rows = distinct_prompts(self.name, self._train, *fields)
        if test is None:
            self._test = self._train
            test_rows = _held_out_rows(train_rows, data.test_fraction)
        else:
            self._test = test
            test_rows = distinct_prompts(f"{self.name} (test)", test, *fields)
        self._train_rows = [row for key, row in train_rows.items() if key not in test_rows]
        self.digest = digest(self._train, train_rows, data.answer_field)
        if test is not None:
            self.digest += digest(test, test_rows, data.answer_field)
        self.repeated, self.in_both = len(self._train) - len(train_rows), 0
        if test is not None:
            self.repeated += len(test) - len(test_rows)
            self.in_both = len(train_rows) - len(self._train_rows)
        self._test_rows = np.random.default_rng(0).permutation(sorted(test_rows.values())).tolist()
        self.num_train: int | None = len(self._train_rows)
        self.num_test = len(self._test_rows)
        if not self._train_rows or not self._test_rows:
            raise ValueError(
                f"{self.name}: its {len(train_rows)} different prompts leave "
                f"{len(self._train_rows)} to train on and {self.num_test} to hold out; both need 1"
                + (f", and data.test_fraction is {data.test_fraction}" if test is None else "")
            )
        self._order = lru_cache(2)(self._make_order)
        if data.demonstration_field:
            self.demonstrations = self._demonstrations

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of `split`; its answer is `answer_text` of the answer column."""
        check_index(split, index, self.num_test)
        if split == "train":
            epoch, position = divmod(index, len(self._train_rows))
            row = self._train[self._train_rows[self._order(epoch)[position]]]
        else:
            row = self._test[self._test_rows[index]]
        return self._problem(row)

    def problems(self, split: str) -> dict[int, Problem]:
        """Every problem of `split` by the number of its row; ValueError for what is no prompt."""
        rows, data = self._of(split)
        found = {}
        for number in sorted(rows):
            try:
                found[number] = self._problem(data[number])
            except ValueError as error:
                raise ValueError(f"{self.name}: row {number}: no prompt: {error}") from error
        return found

    def leave_out(self, split: str, numbers: Collection[int]) -> None:
        """Leave out the rows of these `numbers`, before a problem is asked for."""
        rows, _ = self._of(split)
        rows[:] = [row for row in rows if row not in numbers]
        self.num_train, self.num_test = len(self._train_rows), len(self._test_rows)

    def _of(self, split: str) -> tuple[list[int], Any]:
        test = split == "test"
        return (self._test_rows, self._test) if test else (self._train_rows, self._train)

    def _problem(self, row: Any) -> Problem:
        prompt, answer = (
            lookup(row, field) for field in (self._data.prompt_field, self._data.answer_field)
        )
        return pose(self._tokenizer, prompt, answer_text(answer), self._data)

    def training_prompts(self) -> Iterator[Any]:
        """The prompt of every row that is trained on, as the source has it."""
        for row in self._train_rows:
            yield lookup(self._train[row], self._data.prompt_field)

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 for a right answer, 0.0 for a wrong one, as `math_reward` tells."""
        return math_reward(problem.answer, response)

    def _demonstrations(self, count: int, seed: int) -> list[tuple[Problem, str]]:
        """Up to `count` training problems with their worked responses, in an order of `seed`.

        Raises ValueError, naming the row, where a response is missing or no text.
        """
        name = self._data.demonstration_field
        order = np.random.default_rng(seed).permutation(len(self._train_rows))[:count]
        pairs = []
        for number in (self._train_rows[place] for place in order):
            row = self._train[number]
            response = lookup(row, name)
            if not isinstance(response, str) or not response:
                raise ValueError(
                    f"{self.name}: row {number}: data.demonstration_field {name!r} must name a "
                    f"column of texts; got {response!r}"
                )
            pairs.append((self._problem(row), response))
        return pairs

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._train_rows))


def _held_out_rows(rows: dict[int, int], fraction: float) -> dict[int, int]:
    """The part of `rows`, by hash of the prompt, that is on the test side."""
    if not 0 < fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, not {fraction}")
    return {key: row for key, row in rows.items() if held_out(key, fraction)}
