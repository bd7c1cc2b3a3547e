"""The long number ladder: more operations, goals further away, two decisions a step.

The prompt `17>41 +2+7-3-5*2:` is the ladder's with two additions and two subtractions, so that the
operand is a decision as well as the operator. Demonstrations lean towards the goal at every step,
by a little: policies trained on random walks do not know the goal, and reinforcement of so many
decisions finds no signal.
"""

import random
from dataclasses import asdict, dataclass

from trainer.problems import Problem
from trainer.tasks.ladder import LARGEST, OPERANDS, OPERATORS, STEP, TEST_FRACTION
from trainer.tasks.split import check_index, held_out, stable_hash

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
        chain = response.removesuffix("!").split(",")
        if not response.endswith("!") or len(chain) > MAX_STEPS:
            return False
        value = self.start
        for step in chain:
            match = STEP.fullmatch(step)
            if match is None:
                return False
            before, symbol, operand, after = match.groups()
            result = self.steps(value).get((symbol, int(operand)))
            if int(before) != value or result is None or result != int(after):
                return False
            value = result
        return value == self.goal


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


class LongLadder:
    """The long ladder as a task; an eighth of all prompts, by hash, is held out.

    Training problems depend on `seed`; the held-out ones do not, so that runs compare.
    """

    name = "ladder:long"

    def __init__(self, seed: int, num_test: int = 4096):
        self.seed = seed
        self.num_test = num_test

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of `split`; its answer holds the puzzle's numbers."""
        check_index(split, index, self.num_test)
        stream = f"{self.seed}/train" if split == "train" else "test"
        puzzle = draw_long_puzzle(random.Random(f"{self.name}/{stream}/{index}"), split)
        return Problem(puzzle.prompt, asdict(puzzle))

    def reward(self, problem: Problem, response: str) -> float:
        """1.0 for a chain of legal, right operations that ends at the goal with `!`, else 0.0."""
        numbers = problem.answer
        operations = tuple((symbol, operand) for symbol, operand in numbers["operations"])
        puzzle = LongPuzzle(numbers["start"], numbers["goal"], operations)
        return float(puzzle.solved_by(response))

    def demonstrations(self, count: int, seed: int) -> list[tuple[str, str]]:
        """`count` training prompts, each with one walk that leans towards the goal."""
        rng = random.Random(f"{self.name}/demonstrations/{seed}")
        pairs = []
        for _ in range(count):
            puzzle = draw_long_puzzle(rng, "train")
            pairs.append((puzzle.prompt, puzzle.walk(rng, TOWARDS)))
        return pairs
