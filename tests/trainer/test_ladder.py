"""The number ladders: their verifiers against brute force, splits and demonstrations."""

import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Data
from trainer.tasks import make_task
from trainer.tasks.ladder import MAX_STEPS, Ladder, Puzzle
from trainer.tasks.long_ladder import (
    DISTANCES,
    LongLadder,
    LongPuzzle,
    draw_long_puzzle,
)
from trainer.tasks.long_ladder import MAX_STEPS as LONG_STEPS
from trainer.tasks.problem import Problem
from trainer.tiny.model import build_tokenizer

PUZZLE = Puzzle(17, 18, {"+": 4, "-": 3, "*": 3})
LONG = LongPuzzle(17, 41, (("+", 2), ("+", 7), ("-", 3), ("-", 5), ("*", 2)))
GOOD = "17+4=21,21-3=18!"
LONG_GOOD = "17+7=24,24+2=26,26-5=21,21*2=42,42+2=44,44-3=41!"


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
def test_distance_of_a_far_goal_agrees_with_brute_force(index):
    puzzle = LongPuzzle(**LongLadder(0).problem("test", index).answer)
    least = next(n for n in range(10) if puzzle.goal in reached(puzzle, n))
    assert least in DISTANCES
    assert puzzle.distances()[puzzle.start] == least


@pytest.mark.parametrize(("puzzle", "good"), [(PUZZLE, GOOD), (LONG, LONG_GOOD)], ids=["", "long"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda good: "", id="empty"),
        pytest.param(lambda good: "!", id="no steps"),
        pytest.param(lambda good: good[:-1], id="no verdict"),
        pytest.param(lambda good: good[:-1] + "?", id="gave up at the goal"),
        pytest.param(lambda good: good + "!", id="two verdicts"),
        pytest.param(lambda good: good + "\n", id="newline after"),
        pytest.param(lambda good: " " + good, id="space before"),
        pytest.param(lambda good: good.replace(",", ", "), id="space within"),
        pytest.param(lambda good: good.partition(",")[2], id="wrong first value"),
    ],
)
def test_what_is_not_a_whole_chain_is_wrong(puzzle, good, change):
    assert puzzle.solved_by(good)
    assert not puzzle.solved_by(change(good))


@pytest.mark.parametrize(
    ("puzzle", "response"),
    [
        pytest.param(PUZZLE, "17+4=21,,21-3=18!", id="empty step"),
        pytest.param(PUZZLE, "17+4=21,22-4=18!", id="does not continue"),
        pytest.param(PUZZLE, "17+4=22,22-4=18!", id="wrong arithmetic"),
        pytest.param(PUZZLE, "17+1=18!", id="operand not in the prompt"),
        pytest.param(PUZZLE, "17/1=17,17+4=21,21-3=18!", id="operator not in the prompt"),
        pytest.param(PUZZLE, "17+4=21!", id="not the goal"),
        pytest.param(PUZZLE, "17+04=21,21-3=18!", id="leading zero of an operand"),
        pytest.param(PUZZLE, "017+4=21,21-3=18!", id="leading zero of a value"),
        pytest.param(PUZZLE, "\uff11\uff17+4=21,21-3=18!", id="full-width digits"),
        pytest.param(PUZZLE, "17+4=21,21-3=\u0661\u0668!", id="arabic digits"),
        pytest.param(PUZZLE, "17+4=21,21\u22123=18!", id="typographic minus"),
        pytest.param(PUZZLE, "17+4=21,21-3=18,18*3=54,54-3=51!", id="beyond 50"),
        pytest.param(PUZZLE, "17+4=21;21-3=18!", id="another separator"),
        pytest.param(PUZZLE, "17>18 +4-3*3:" + GOOD, id="prompt repeated"),
        pytest.param(PUZZLE, "__import__('os').abort()!", id="code"),
        pytest.param(LONG, "17+7=24,25+2=27!", id="long, does not continue"),
        pytest.param(LONG, "17+7=24,24+2=27!", id="long, wrong arithmetic"),
        pytest.param(
            LONG, LONG_GOOD.replace("+7=24", "+6=23"), id="long, operand not in the prompt"
        ),
        pytest.param(
            LONG, "17*2=34,34+7=41,41+07=48,48-7=41!", id="long, operand of another symbol"
        ),
        pytest.param(LONG, "17*2=34,34+07=41!", id="long, leading zero"),
        pytest.param(LONG, "17*2=34!", id="long, not the goal"),
        pytest.param(LONG, "17+2=19,19-2=17," * 5 + "17*2=34,34+7=41!", id="long, too long"),
    ],
)
def test_verifier_is_strict(puzzle, response):
    assert not puzzle.solved_by(response)


def test_verifier_counts_steps_and_bounds():
    around = Puzzle(10, 12, {"+": 2, "-": 2, "*": 2})
    detour = "10+2=12,12-2=10,"
    assert around.solved_by(detour * 2 + "10+2=12!")  # 5 steps, through the goal
    assert not around.solved_by(detour * 3 + "10+2=12!")  # 7 steps
    assert around.solved_by("10-2=8,8-2=6,6*2=12!")
    assert LONG.solved_by("17*2=34,34+7=41!")
    low = Puzzle(1, 3, {"+": 4, "-": 2, "*": 2})
    assert not low.solved_by("1-2=-1,-1+4=3!")


@given(st.sampled_from([Ladder(0), LongLadder(0)]), st.integers(0, 2**32), st.data())
def test_replay_of_random_chains(task, seed, data):
    """A chain built step by step is right exactly when the puzzle's goal is where it ends."""
    puzzle = task.draw(random.Random(seed), "train")
    value, chain = puzzle.start, []
    most = LONG_STEPS if isinstance(task, LongLadder) else MAX_STEPS
    for _ in range(data.draw(st.integers(1, most))):
        move, result = data.draw(st.sampled_from(sorted(puzzle.steps(value).items())))
        symbol, operand = move if isinstance(move, tuple) else (move, puzzle.operands[move])
        chain.append(f"{value}{symbol}{operand}={result}")
        value = result
    assert puzzle.solved_by(",".join(chain) + "!") == (value == puzzle.goal)
    assert replace(puzzle, goal=value).solved_by(",".join(chain) + "!")


@given(st.text(alphabet="0123456789+-*=,!?>: ", max_size=60))
def test_replay_never_fails(response):
    for task, puzzle in ((Ladder(0), PUZZLE), (LongLadder(0), LONG)):
        assert task.reward(Problem("", vars(puzzle)), response) in (0.0, 1.0)


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


@pytest.mark.parametrize(("kind", "count", "least"), [(Ladder, 4096, 2048), (LongLadder, 500, 490)])
def test_splits_are_disjoint_and_fixed_by_index(kind, count, least):
    task, other = kind(0), kind(1)
    held_out = {task.problem("test", i).prompt for i in range(count)}
    assert len(held_out) > least
    assert not held_out & {task.problem("train", i).prompt for i in range(count)}
    assert not held_out & {problem.prompt for problem, _ in task.demonstrations(count // 2, seed=3)}
    assert task.problem("test", 77) == kind(0).problem("test", 77) == other.problem("test", 77)
    train = task.problem("train", 77)
    assert train == kind(0).problem("train", 77) != other.problem("train", 77)
    with pytest.raises(ValueError, match="0 to 4095"):
        task.problem("test", 4096)


def test_index_and_split_are_checked():
    task = Ladder(0, num_test=10)
    assert task.problem("train", 0).prompt == "11>24 +2-3*3:"  # in every process and version
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
    for problem, response in pairs:
        prompt = problem.prompt
        start, goal, *_ = (int(number) for number in prompt.split()[0].split(">"))
        operands = {s: int(prompt[prompt.index(s, 4) + 1]) for s in "+-*"}
        solved = Puzzle(start, goal, operands).solved_by(response)
        assert solved == response.endswith("!")
        assert response.count("=") <= MAX_STEPS
        assert solved or (response.endswith("?") and response.count("=") == MAX_STEPS)
        arrived += solved
    assert 0.62 < arrived / len(pairs) < 0.74


def test_demonstrations_of_the_long_ladder_lean_towards_the_goal():
    task = LongLadder(0)
    pairs = task.demonstrations(1000, seed=0)
    assert pairs[:100] == task.demonstrations(100, seed=0)
    ends = Counter(response[-1] for _, response in pairs)
    rng = random.Random(0)
    blind = Counter(draw_long_puzzle(rng, "train").walk(rng, 0.0)[-1] for _ in range(1000))
    assert ends["!"] > 2 * blind["!"]
    assert max(response.count("=") for _, response in pairs) == LONG_STEPS
    assert all(r.count("=") == LONG_STEPS for _, r in pairs if r.endswith("?"))


def test_a_sure_walk_is_a_shortest_way():
    rng = random.Random(1)
    for _ in range(50):
        puzzle = draw_long_puzzle(rng, "train")
        chain = puzzle.walk(rng, 1.0)
        assert puzzle.solved_by(chain)
        assert chain.count("=") == puzzle.distances()[puzzle.start]


@pytest.mark.parametrize("name", ["ladder", "ladder:long"])
def test_answer_survives_json_and_tokens(name):
    task = make_task(Data(task=name), 0)
    problem, tokenizer = task.problem("train", 5), build_tokenizer()
    puzzle = task.puzzle(problem.answer)
    if name == "ladder":
        right = right_chains(puzzle.start, puzzle.goal, *puzzle.operands.values()).pop()
    else:
        right = puzzle.walk(random.Random(0), 1.0)
    again = Problem(problem.prompt, json.loads(json.dumps(problem.answer, sort_keys=True)))
    assert task.reward(again, right) == 1.0
    for text in (problem.prompt, right):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("name", ["ladders", "", "gym:", "file:", "maze:3"])
def test_unknown_task_lists_the_forms(name):
    with pytest.raises(ValueError, match='"ladder", "ladder:long", "gym:NAME", "file:PATH"'):
        make_task(Data(task=name), 0)
