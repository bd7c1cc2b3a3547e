"""The long number ladder: more operations, goals further away, two decisions per step.

The prompt `17>41 +2+7-3-5*2:` is the ladder's with two additions and two subtractions, so that the
operand is a decision as well as the operator. Demonstrations lean towards the goal at every step,
by a little: policies trained on random walks do not know the goal, and reinforcement of so many
decisions finds no signal.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.tasks.ladder import LARGEST, OPERANDS, OPERATORS, TEST_FRACTION, Ladder, solves
from trainer.tasks.split import held_out, stable_hash

MAX_STEPS = 10
DISTANCES = (2, 3, 4)
SYMBOLS = "++--*"
TOWARDS = 0.5
"""Probability that a step of a demonstration is one of a shortest way; else it is any legal one."""

Operation = tuple[str, int]


@dataclass(frozen=True)
class LongPuzzle:
    """One prompt: the way from `start` to `goal` by `operations`, each a symbol and its operand."""

    start: int
    goal: int
    operations: tuple[Operation, ...]

    @property
    def prompt(self) -> str:
        """The text of the puzzle."""
        operations = "".join(f"{symbol}{operand}" for symbol, operand in self.operations)
        return f"{self.start}>{self.goal} {operations}:"

    def steps(self, value: int) -> dict[Operation, int]:
        """Where each legal operation leads from `value`."""
        results = {(s, operand): OPERATORS[s](value, operand) for s, operand in self.operations}
        return {step: result for step, result in results.items() if 0 <= result <= LARGEST}

    def distances(self) -> dict[int, int]:
        """Least number of operations to the goal, by value; values that cannot reach it lack."""
        sources: dict[int, set[int]] = {}
        for value in range(LARGEST + 1):
            for result in self.steps(value).values():
                sources.setdefault(result, set()).add(value)
        found, frontier = {self.goal: 0}, {self.goal}
        while frontier:
            before = {value for result in frontier for value in sources.get(result, ())}
            frontier = before - found.keys()
            found |= dict.fromkeys(frontier, max(found.values()) + 1)
        return found

    def walk(self, rng: random.Random, towards: float) -> str:
        """A chain up to the goal or the step limit, each step on a shortest way by chance."""
        distances, far = self.distances(), LARGEST + 1
        value = self.start
        chain: list[str] = []
        while value != self.goal and len(chain) < MAX_STEPS:
            steps = list(self.steps(value).items())
            near = min(distances.get(result, far) for _, result in steps)
            if rng.random() < towards:
                steps = [step for step in steps if distances.get(step[1], far) == near]
            (symbol, operand), result = rng.choice(steps)
            chain.append(f"{value}{symbol}{operand}={result}")
            value = result
        return ",".join(chain) + ("!" if value == self.goal else "?")

    def solved_by(self, response: str) -> bool:
        """Whether `response` is a right chain, to the character; nothing in it is evaluated."""
        return solves(response, self.start, self.goal, MAX_STEPS, self.step)

    def step(self, value: int, symbol: str, operand: int) -> int | None:
        """Where the operation leads from `value`; None where it is not one of the puzzle's."""
        return self.steps(value).get((symbol, operand))


def draw_long_puzzle(rng: random.Random, split: str) -> LongPuzzle:
    """A puzzle of `split` with a goal at one of DISTANCES."""
    while True:
        operations: list[Operation] = []
        for symbol in sorted(set(SYMBOLS), key=SYMBOLS.index):
            low, high = OPERANDS[symbol]
            operands = rng.sample(range(low, high + 1), SYMBOLS.count(symbol))
            operations += [(symbol, operand) for operand in operands]
        start, goal = rng.randint(1, LARGEST), rng.randint(0, LARGEST)
        puzzle = LongPuzzle(start, goal, tuple(operations))
        in_test = held_out(stable_hash(puzzle.prompt), TEST_FRACTION)
        if in_test == (split == "test") and puzzle.distances().get(start) in DISTANCES:
            return puzzle


class LongLadder(Ladder):
    """The long ladder as a task."""

    name = "ladder:long"

    def draw(self, rng: random.Random, split: str) -> LongPuzzle:
        """A puzzle of `split`."""
        return draw_long_puzzle(rng, split)

    def puzzle(self, answer: Mapping[str, Any]) -> LongPuzzle:
        """The puzzle of a problem's answer, whose pairs are lists once it has been JSON."""
        operations = tuple((symbol, operand) for symbol, operand in answer["operations"])
        return LongPuzzle(answer["start"], answer["goal"], operations)

    def demonstrate(self, puzzle: LongPuzzle, rng: random.Random) -> str:
        """One walk that leans towards the goal."""
        return puzzle.walk(rng, TOWARDS)
