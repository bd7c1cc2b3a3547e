"""The number ladder: its verifier against brute force, its splits, its demonstrations."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Data
from trainer.tasks import make_task
from trainer.tasks.ladder import MAX_STEPS, Ladder, Puzzle, draw_puzzle
from trainer.tasks.problem import Problem

PUZZLE = Puzzle(17, 18, {"+": 4, "-": 3, "*": 3})
GOOD = "17+4=21,21-3=18!"


def right_chains(start: int, goal: int, plus: int, minus: int, times: int) -> set[str]:
    """Every right response of at most 6 steps, by trying all sequences of operators."""
    chains = set()
    moves = {"+": lambda v: v + plus, "-": lambda v: v - minus, "*": lambda v: v * times}
    operand = {"+": plus, "-": minus, "*": times}
    for length in range(1, 7):
        for symbols in itertools.product("+-*", repeat=length):
            values = [start]
            for symbol in symbols:
                values.append(moves[symbol](values[-1]))
            if values[-1] == goal and all(0 <= value <= 50 for value in values):
                steps = zip(values, symbols, values[1:], strict=False)
                chains.add(",".join(f"{a}{s}{operand[s]}={b}" for a, s, b in steps) + "!")
    return chains


@pytest.mark.parametrize("index", range(20))
def test_verifier_agrees_with_brute_force(index):
    task = Ladder(0)
    problem = task.problem("test", index)
    puzzle = problem.answer
    right = right_chains(puzzle["start"], puzzle["goal"], *puzzle["operands"].values())
    assert right
    assert all(task.reward(problem, chain) == 1.0 for chain in right)
    for chain in sorted(right)[:10]:
        for position, symbol in itertools.product(range(len(chain) + 1), "0123456789+-*=,!? "):
            for changed in (
                chain[:position] + symbol + chain[position:],
                chain[:position] + symbol + chain[position + 1 :],
                chain[:position] + chain[position + 1 :],
            ):
                assert task.reward(problem, changed) == float(changed in right), changed


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("", id="empty"),
        pytest.param("!", id="no steps"),
        pytest.param(GOOD[:-1], id="no verdict"),
        pytest.param(GOOD[:-1] + "?", id="gave up at the goal"),
        pytest.param(GOOD + "!", id="two verdicts"),
        pytest.param(GOOD + "\n", id="newline after"),
        pytest.param(" " + GOOD, id="space before"),
        pytest.param(GOOD.replace(",", ", "), id="space within"),
        pytest.param("17+4=21,,21-3=18!", id="empty step"),
        pytest.param("21-3=18!", id="wrong first value"),
        pytest.param("17+4=21,22-4=18!", id="does not continue"),
        pytest.param("17+4=22,22-4=18!", id="wrong arithmetic"),
        pytest.param("17+1=18!", id="operand not in the prompt"),
        pytest.param("17/1=17,17+4=21,21-3=18!", id="operator not in the prompt"),
        pytest.param("17+4=21!", id="not the goal"),
        pytest.param("17+04=21,21-3=18!", id="leading zero of an operand"),
        pytest.param("017+4=21,21-3=18!", id="leading zero of a value"),
        pytest.param("\uff11\uff17+4=21,21-3=18!", id="full-width digits"),
        pytest.param("17+4=21,21-3=\u0661\u0668!", id="arabic digits"),
        pytest.param("17+4=21,21\u22123=18!", id="typographic minus"),
        pytest.param("17+4=21,21-3=18,18*3=54,54-3=51!", id="beyond 50"),
        pytest.param("17+4=21;21-3=18!", id="another separator"),
        pytest.param("17>18 +4-3*3:" + GOOD, id="prompt repeated"),
        pytest.param("__import__('os').abort()!", id="code"),
    ],
)
def test_verifier_is_strict(response):
    assert PUZZLE.solved_by(GOOD)
    assert not PUZZLE.solved_by(response)


def test_verifier_counts_steps_and_bounds():
    around = Puzzle(10, 12, {"+": 2, "-": 2, "*": 2})
    detour = "10+2=12,12-2=10,"
    assert around.solved_by(detour * 2 + "10+2=12!")  # 5 steps, through the goal
    assert not around.solved_by(detour * 3 + "10+2=12!")  # 7 steps
    assert around.solved_by("10-2=8,8-2=6,6*2=12!")
    low = Puzzle(1, 3, {"+": 4, "-": 2, "*": 2})
    assert not low.solved_by("1-2=-1,-1+4=3!")


@given(st.integers(0, 2**32), st.integers(1, 6), st.data())
def test_replay_of_random_chains(seed, length, data):
    """A chain built step by step is right exactly when the puzzle's goal is where it ends."""
    puzzle = draw_puzzle(random.Random(seed), "train")
    value, chain = puzzle.start, []
    for _ in range(length):
        symbol, result = data.draw(st.sampled_from(sorted(puzzle.steps(value).items())))
        chain.append(f"{value}{symbol}{puzzle.operands[symbol]}={result}")
        value = result
    assert puzzle.solved_by(",".join(chain) + "!") == (value == puzzle.goal)
    assert Puzzle(puzzle.start, value, puzzle.operands).solved_by(",".join(chain) + "!")


@given(st.text(alphabet="0123456789+-*=,!?>: ", max_size=60))
def test_replay_never_fails(response):
    task = Ladder(0)
    assert task.reward(Problem("", vars(PUZZLE)), response) in (0.0, 1.0)


def test_problems_are_within_the_rules():
    task = Ladder(0)
    for index in range(300):
        problem = task.problem("train", index)
        puzzle = Puzzle(**problem.answer)
        plus, minus, times = puzzle.operands.values()
        assert problem.prompt == f"{puzzle.start}>{puzzle.goal} +{plus}-{minus}*{times}:"
        assert 1 <= puzzle.start <= 50
        assert 0 <= puzzle.goal <= 50
        assert 2 <= plus <= 9
        assert 2 <= minus <= 9
        assert 2 <= times <= 3
        chains = right_chains(puzzle.start, puzzle.goal, plus, minus, times)
        assert min(chain.count("=") for chain in chains) in (2, 3)


def test_splits_are_disjoint_and_fixed_by_index():
    task, other = Ladder(0), Ladder(1)
    test = [task.problem("test", i) for i in range(task.num_test)]
    train = [task.problem("train", i) for i in range(4096)]
    demonstrated = {prompt for prompt, _ in task.demonstrations(2000, seed=3)}
    held_out = {problem.prompt for problem in test}
    assert len(held_out) > task.num_test / 2
    assert not held_out & {problem.prompt for problem in train}
    assert not held_out & demonstrated
    assert test[77] == Ladder(0).problem("test", 77) == other.problem("test", 77)
    assert train[77] == Ladder(0).problem("train", 77) != other.problem("train", 77)
    assert train[0].prompt == "11>24 +2-3*3:"  # the same in every process and version


def test_index_and_split_are_checked():
    task = Ladder(0, num_test=10)
    with pytest.raises(ValueError, match="0 to 9"):
        task.problem("test", 10)
    with pytest.raises(ValueError, match="-1"):
        task.problem("train", -1)
    with pytest.raises(ValueError, match="'valid'"):
        task.problem("valid", 0)


def test_demonstrations_succeed_as_often_as_the_best_of_three_walks():
    task = Ladder(0)
    pairs = task.demonstrations(5000, seed=0)
    assert pairs == task.demonstrations(5000, seed=0)
    assert pairs[:100] == task.demonstrations(100, seed=0)
    arrived = 0
    for prompt, response in pairs:
        start, goal, *_ = (int(number) for number in prompt.split()[0].split(">"))
        operands = {s: int(prompt[prompt.index(s, 4) + 1]) for s in "+-*"}
        solved = Puzzle(start, goal, operands).solved_by(response)
        assert solved == response.endswith("!")
        assert response.count("=") <= MAX_STEPS
        assert solved or (response.endswith("?") and response.count("=") == MAX_STEPS)
        arrived += solved
    assert 0.62 < arrived / len(pairs) < 0.74


def test_answer_survives_json():
    task = make_task(Data(), 0)
    problem = task.problem("train", 5)
    puzzle = Puzzle(**problem.answer)
    right = right_chains(puzzle.start, puzzle.goal, *puzzle.operands.values()).pop()
    again = Problem(problem.prompt, json.loads(json.dumps(problem.answer, sort_keys=True)))
    assert task.reward(again, right) == 1.0


@pytest.mark.parametrize("name", ["ladders", "", "gym:", "file:", "maze:3"])
def test_unknown_task_lists_the_forms(name):
    with pytest.raises(ValueError, match='"ladder", "ladder:long", "gym:NAME", "file:PATH"'):
        make_task(Data(task=name), 0)
