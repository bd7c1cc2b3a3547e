"""The long ladder: its verifier and distances against brute force, its splits, its walks."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Data
from trainer.tasks import make_task
from trainer.tasks.long_ladder import (
    DISTANCES,
    MAX_STEPS,
    LongLadder,
    LongPuzzle,
    draw_long_puzzle,
)
from trainer.tasks.problem import Problem
from trainer.tiny.model import build_tokenizer

PUZZLE = LongPuzzle(17, 41, (("+", 2), ("+", 7), ("-", 3), ("-", 5), ("*", 2)))
GOOD = "17+7=24,24+2=26,26-5=21,21*2=42,42+2=44,44-3=41!"


def reached(puzzle: LongPuzzle, steps: int) -> set[int]:
    """Every value that `steps` operations lead to, by trying all."""
    found = {puzzle.start}
    for _ in range(steps):
        moves = [
            eval(f"{value}{symbol}{operand}")
            for value in found
            for symbol, operand in puzzle.operations
        ]
        found = {value for value in moves if 0 <= value <= 50}
    return found


@pytest.mark.parametrize("index", range(10))
def test_distance_of_the_goal_agrees_with_brute_force(index):
    puzzle = LongPuzzle(**LongLadder(0).problem("test", index).answer)
    least = next(n for n in range(10) if puzzle.goal in reached(puzzle, n))
    assert least in DISTANCES
    assert puzzle.distances()[puzzle.start] == least


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("", id="empty"),
        pytest.param("!", id="no steps"),
        pytest.param(GOOD[:-1], id="no verdict"),
        pytest.param(GOOD[:-1] + "?", id="gave up at the goal"),
        pytest.param(GOOD + "!", id="two verdicts"),
        pytest.param(GOOD.replace(",", ", "), id="space within"),
        pytest.param(GOOD.removeprefix("17+7=24,"), id="wrong first value"),
        pytest.param("17+7=24,25+2=27!", id="does not continue"),
        pytest.param("17+7=24,24+2=27!", id="wrong arithmetic"),
        pytest.param(GOOD.replace("+7=24", "+6=23"), id="operand not in the prompt"),
        pytest.param("17*2=34,34+7=41,41+07=48,48-7=41!", id="operand of another symbol"),
        pytest.param("17*2=34,34+07=41!", id="leading zero"),
        pytest.param("17*2=34!", id="not the goal"),
        pytest.param("17+2=19,19-2=17," * 5 + "17*2=34,34+7=41!", id="too long"),
    ],
)
def test_verifier_is_strict(response):
    assert PUZZLE.solved_by(GOOD)
    assert PUZZLE.solved_by("17*2=34,34+7=41!")
    assert not PUZZLE.solved_by(response)


@given(st.integers(0, 2**32), st.integers(1, MAX_STEPS), st.data())
def test_replay_of_random_chains(seed, length, data):
    """A chain built step by step is right exactly when the puzzle's goal is where it ends."""
    puzzle = draw_long_puzzle(random.Random(seed), "train")
    value, chain = puzzle.start, []
    for _ in range(length):
        (symbol, operand), result = data.draw(st.sampled_from(sorted(puzzle.steps(value).items())))
        chain.append(f"{value}{symbol}{operand}={result}")
        value = result
    assert puzzle.solved_by(",".join(chain) + "!") == (value == puzzle.goal)
    ends = LongPuzzle(puzzle.start, value, puzzle.operations)
    assert ends.solved_by(",".join(chain) + "!")


@given(st.text(alphabet="0123456789+-*=,!?>: ", max_size=60))
def test_replay_never_fails(response):
    problem = Problem("", {"start": 17, "goal": 41, "operations": PUZZLE.operations})
    assert LongLadder(0).reward(problem, response) in (0.0, 1.0)


def test_splits_are_disjoint_and_fixed_by_index():
    task, other = LongLadder(0), LongLadder(1)
    held_out = {task.problem("test", i).prompt for i in range(500)}
    assert len(held_out) > 490
    assert not held_out & {task.problem("train", i).prompt for i in range(500)}
    assert not held_out & {prompt for prompt, _ in task.demonstrations(500, seed=3)}
    assert task.problem("test", 77) == other.problem("test", 77)
    assert task.problem("train", 77) == LongLadder(0).problem("train", 77)
    assert task.problem("train", 77) != other.problem("train", 77)
    with pytest.raises(ValueError, match="0 to 4095"):
        task.problem("test", 4096)


def test_demonstrations_lean_towards_the_goal():
    task = LongLadder(0)
    pairs = task.demonstrations(1000, seed=0)
    assert pairs[:100] == task.demonstrations(100, seed=0)
    ends = Counter(response[-1] for _, response in pairs)
    rng = random.Random(0)
    blind = Counter(draw_long_puzzle(rng, "train").walk(rng, 0.0)[-1] for _ in range(1000))
    assert ends["!"] > 2 * blind["!"]
    longest = max(response.count("=") for _, response in pairs)
    assert longest == MAX_STEPS
    assert all(r.count("=") == MAX_STEPS for _, r in pairs if r.endswith("?"))


def test_a_sure_walk_is_a_shortest_way():
    rng = random.Random(1)
    for _ in range(50):
        puzzle = draw_long_puzzle(rng, "train")
        chain = puzzle.walk(rng, 1.0)
        assert puzzle.solved_by(chain)
        assert chain.count("=") == puzzle.distances()[puzzle.start]


def test_answer_survives_json_and_tokens():
    task = make_task(Data(task="ladder:long"), 0)
    problem = task.problem("train", 5)
    puzzle = LongPuzzle(**problem.answer)
    right = puzzle.walk(random.Random(0), 1.0)
    again = Problem(problem.prompt, json.loads(json.dumps(problem.answer)))
    assert task.reward(again, right) == 1.0
    tokenizer = build_tokenizer()
    for text in (problem.prompt, right):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
