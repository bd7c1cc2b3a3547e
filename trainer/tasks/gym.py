"""Any reasoning-gym dataset as a task: "gym:NAME"."""

import difflib
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from trainer.config import Data
from trainer.tasks.answers import final_answer
from trainer.tasks.harmless import harmless
from trainer.tasks.problem import Problem
from trainer.tasks.render import pose
from trainer.tasks.split import check_index, held_out, stable_hash

BLOCK = 256
TEST_FRACTION = 1 / 8

_MAX_DRAWS = 1000
_NEEDS_CONFIGURATION = {"composite"}
# What scorers raise for text that is no answer; anything else is a defect and passes through.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Gym:
    """A reasoning-gym dataset with its defaults; an eighth of all questions, by hash, is held out.

    Questions come in blocks, each from a seed of its own; a question of the wrong side is drawn
    again from another seed. Training questions depend on `seed`, the held-out ones do not.
    """

    verifier = "trainer.tasks.gym:gym_verifier"
    num_train: int | None = None

    def __init__(self, name: str, seed: int, data: Data, tokenizer: Any, num_test: int = 1024):
        known = set(DATASETS) - _NEEDS_CONFIGURATION
        if name not in known:
            close = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or sorted(known)
            raise ValueError(f"no reasoning-gym dataset {name!r}; there is {', '.join(close)}")
        self.name = f"gym:{name}"
        self.num_test = num_test
        self.digest = f"reasoning-gym {version('reasoning-gym')}"  # whose code makes the questions
        self._dataset_name = name
        self._seed = seed
        self._data = data
        self._tokenizer = tokenizer
        self._dataset = lru_cache(64)(self._make_dataset)
        self._entry = lru_cache(1024)(self._make_entry)

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of `split`.

        Its answer is the dataset's, for the reader, with the name, seed and position that give the
        scorer the whole entry back.
        """
        check_index(split, index, self.num_test)
        stream = f"{self._seed}/train" if split == "train" else "test"
        block, position = divmod(index, BLOCK)
        for draw in range(_MAX_DRAWS):
            seed = stable_hash(f"{self.name}/{stream}/{block}/{draw}") % 2**31
            entry = self._entry(seed, position)
            in_test = held_out(stable_hash(entry["question"]), TEST_FRACTION)
            if in_test == (split == "test"):
                answer = {
                    "dataset": self._dataset_name,
                    "seed": seed,
                    "position": position,
                    "answer": entry["answer"],
                }
                return pose(self._tokenizer, entry["question"], answer, self._data)
        raise ValueError(
            f"{self.name} has too few different questions: none of {_MAX_DRAWS} draws is of the "
            f"{split} side"
        )

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 where the dataset's scorer gives `final_answer(response)` the full score, else 0.0.

        Partial credit, an answer on which the scorer fails, and one that would run as code are all
        0.0. There is no time limit here; `trainer.rewards.verifier` has one.
        """
        answer = final_answer(response)
        if not harmless(self._dataset_name, answer):
            return 0.0
        seed, position = problem.answer["seed"], problem.answer["position"]
        entry, scorer = self._entry(seed, position), self._dataset(seed).score_answer
        try:
            return float(scorer(answer, entry) >= 1.0)
        except _MALFORMED:
            return 0.0

    def answered(self, response: str) -> bool:
        """Whether there is a `final_answer`: in a response that is not blank."""
        return bool(final_answer(response))

    def _make_dataset(self, seed: int) -> Any:
        return reasoning_gym.create_dataset(self._dataset_name, seed=seed, size=BLOCK)

    def _make_entry(self, seed: int, position: int) -> dict[str, Any]:
        return self._dataset(seed)[position]


def gym_verifier(prompt: str, response: str, answer: dict[str, Any]) -> float:
    """`Gym.reward` as a verifier's process calls it."""
    return _scorer(answer["dataset"]).reward(Problem(prompt, answer), response)


@cache
def _scorer(name: str) -> Gym:
    """The task that scores. Seed and settings are any: scores depend on the entry alone."""
    return Gym(name, 0, Data(), None)
