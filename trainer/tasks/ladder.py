"""The number ladder: reach a goal number with three given operations, one decision per step.

The prompt `17>18 +4-3*3:` asks for a way from 17 to 18 with +4, -3 and *3, in any order and any
number of times, in at most 6 steps, all values within 0..50. A response is the worked chain
`17+4=21,21-3=18!`; `!` says "reached", and a chain that gives up ends in `?`.
The operators are the decisions and everything else follows from them, so a policy's entropy is
as bimodal as in the reasoning of large models. Most prompts have many right answers.
"""

import operator
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.tasks.problem import Problem
from trainer.tasks.split import check_index, held_out, stable_hash

LARGEST = 50
MAX_STEPS = 6
DISTANCES = (2, 3)
OPERANDS = {"+": (2, 9), "-": (2, 9), "*": (2, 3)}  # both ends included
TEST_FRACTION = 1 / 8
WALKS = 3

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_NUMBER = "(0|[1-9][0-9]?)"
STEP = re.compile(rf"{_NUMBER}([-+*]){_NUMBER}={_NUMBER}")


@dataclass(frozen=True)
class Puzzle:
    """One prompt: the way from `start` to `goal` with one operand for each operator."""

    start: int
    goal: int
    operands: dict[str, int]

    @property
    def prompt(self) -> str:
        """The text of the puzzle, `17>18 +4-3*3:`."""
        operations = "".join(f"{symbol}{operand}" for symbol, operand in self.operands.items())
        return f"{self.start}>{self.goal} {operations}:"

    def steps(self, value: int) -> dict[str, int]:
        """Where each legal operation leads from `value`, by operator."""
        results = {s: OPERATORS[s](value, operand) for s, operand in self.operands.items()}
        return {symbol: result for symbol, result in results.items() if 0 <= result <= LARGEST}

    def distance(self) -> int | None:
        """Least number of operations from start to goal, or None beyond the largest distance."""
        frontier, seen = {self.start}, {self.start}
        for depth in range(max(DISTANCES) + 1):
            if self.goal in frontier:
                return depth
            frontier = {result for value in frontier for result in self.steps(value).values()}
            frontier -= seen
            seen |= frontier
        return None

    def walk(self, rng: random.Random) -> str:
        """The chain of uniformly random legal operations up to the goal or the step limit."""
        value = self.start
        chain: list[str] = []
        while value != self.goal and len(chain) < MAX_STEPS:
            symbol, result = rng.choice(list(self.steps(value).items()))
            chain.append(f"{value}{symbol}{self.operands[symbol]}={result}")
            value = result
        return ",".join(chain) + ("!" if value == self.goal else "?")

    def solved_by(self, response: str) -> bool:
        """Whether `response` is a right chain, to the character; nothing in it is evaluated."""
        return solves(response, self.start, self.goal, MAX_STEPS, self.step)

    def step(self, value: int, symbol: str, operand: int) -> int | None:
        """Where the operation leads from `value`; None where it is not one of the puzzle's."""
        return self.steps(value).get(symbol) if operand == self.operands[symbol] else None


def solves(
    response: str,
    start: int,
    goal: int,
    most: int,
    step: Callable[[int, str, int], int | None],
) -> bool:
    """Whether `response` is a chain from `start` to `goal`, to the character.

    It has at most `most` operations, which lead where `step` says; nothing in it is evaluated.
    """
    chain = response.removesuffix("!").split(",")
    if not response.endswith("!") or len(chain) > most:
        return False
    value = start
    for link in chain:
        match = STEP.fullmatch(link)
        if match is None:
            return False
        before, symbol, operand, after = match.groups()
        result = step(value, symbol, int(operand))
        if int(before) != value or result is None or result != int(after):
            return False
        value = result
    return value == goal


def draw_puzzle(rng: random.Random, split: str) -> Puzzle:
    """A puzzle of `split` whose goal lies at a distance of 2 or 3, found by a random walk."""
    while True:
        operands = {symbol: rng.randint(*limits) for symbol, limits in OPERANDS.items()}
        start = goal = rng.randint(1, LARGEST)
        for _ in range(rng.choice(DISTANCES)):
            goal = rng.choice(list(Puzzle(start, goal, operands).steps(goal).values()))
        puzzle = Puzzle(start, goal, operands)
        in_test = held_out(stable_hash(puzzle.prompt), TEST_FRACTION)
        if in_test == (split == "test") and puzzle.distance() in DISTANCES:
            return puzzle


class Ladder:
    """The ladder as a task; an eighth of all prompts, by hash, is held out.

    Training problems depend on `seed`; the held-out ones do not, so that runs compare.
    """

    name = "ladder"
    num_train: int | None = None

    def __init__(self, seed: int, num_test: int = 4096):
        self.seed = seed
        self.num_test = num_test

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of `split`; its answer holds the puzzle's numbers."""
        check_index(split, index, self.num_test)
        stream = f"{self.seed}/train" if split == "train" else "test"
        puzzle = self.draw(random.Random(f"{self.name}/{stream}/{index}"), split)
        return Problem(puzzle.prompt, asdict(puzzle))

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 for a chain of legal, right operations that ends at the goal with `!`, else 0.0."""
        return float(self.puzzle(problem.answer).solved_by(response))

    def answered(self, response: str) -> bool:
        """Whether `response` is a chain to its end, right or wrong."""
        links = response[:-1].split(",")
        return response.endswith(("!", "?")) and all(map(STEP.fullmatch, links))

    def demonstrations(self, count: int, seed: int) -> list[tuple[Problem, str]]:
        """`count` training problems, each with a chain that `demonstrate` makes."""
        rng = random.Random(f"{self.name}/demonstrations/{seed}")
        pairs = []
        for _ in range(count):
            puzzle = self.draw(rng, "train")
            problem = Problem(puzzle.prompt, asdict(puzzle))
            pairs.append((problem, self.demonstrate(puzzle, rng)))
        return pairs

    def draw(self, rng: random.Random, split: str) -> Any:
        """A puzzle of `split`."""
        return draw_puzzle(rng, split)

    def puzzle(self, answer: Mapping[str, Any]) -> Any:
        """The puzzle of a problem's answer."""
        return Puzzle(**answer)

    def demonstrate(self, puzzle: Any, rng: random.Random) -> str:
        """The best of 3 random walks.

        The first walk that arrives is taken, else the last. About 68% of the traces arrive, so a
        policy trained on them prefers the operations that lead to the goal, though only a little.
        """
        for _ in range(WALKS):
            chain = puzzle.walk(rng)
            if chain.endswith("!"):
                break
        return chain
