"""reasoning-gym as a task: its splits, its scores, and that no answer runs as code."""

import inspect
import json
import sys

import pytest
from reasoning_gym.factory import DATASETS

from trainer.config import Data
from trainer.tasks import make_task
from trainer.tasks.gym import Gym
from trainer.tasks.harmless import FORMULA_SCORERS, TEXT_SCORERS, harmless
from trainer.tasks.problem import Problem

# They evaluate their own data, or have a parser of that name of their own.
NOT_THE_ANSWER = {
    "basic_arithmetic",
    "bitwise_arithmetic",
    "codeio",
    "number_sorting",
    "propositional_logic",
}


def gym(name: str, seed: int = 0, **data) -> Gym:
    return Gym(name, seed, Data(task=f"gym:{name}", **data), None)


@pytest.mark.parametrize("name", ["leg_counting", "n_queens", "arc_1d", "letter_jumble"])
def test_splits_are_disjoint_and_fixed_by_index(name):
    task = gym(name)
    test = [task.problem("test", i) for i in range(60)]
    train = [task.problem("train", i) for i in range(300)]
    assert not {problem.prompt for problem in test} & {problem.prompt for problem in train}
    assert len({problem.prompt for problem in train}) > 200
    assert train[290] == gym(name).problem("train", 290) != gym(name, seed=1).problem("train", 290)
    assert test[30] == gym(name, seed=1).problem("test", 30)


@pytest.mark.parametrize("name", ["leg_counting", "countdown", "n_queens", "simple_integration"])
def test_reward_is_the_full_score(name):
    task = make_task(Data(task=f"gym:{name}"), 0)
    for index in range(10):
        problem = task.problem("train", index)
        problem = Problem(problem.prompt, json.loads(json.dumps(problem.answer)))
        right = problem.answer["answer"]
        assert task.reward(problem, f"Because.\n<answer>\n{right}\n</answer> Done.") == 1.0
        assert task.reward(problem, "<answer>17 and a half</answer>") == 0.0
        assert task.reward(problem, "") == 0.0


def test_partial_credit_is_no_reward():
    task = gym("spiral_matrix")
    problem = task.problem("train", 0)
    numbers = problem.answer["answer"].split()
    assert task.reward(problem, " ".join(numbers)) == 1.0
    assert task.reward(problem, f"[{', '.join(numbers)}]") == 0.0  # 0.1 in reasoning-gym


def test_a_scorer_that_fails_gives_zero():
    task = gym("prime_factorization")
    assert task.reward(task.problem("train", 0), "two times three") == 0.0


@pytest.mark.parametrize("name", sorted(TEXT_SCORERS | FORMULA_SCORERS))
def test_no_answer_runs_as_code(name, monkeypatch):
    task = gym(name)
    problem = task.problem("train", 0)
    monkeypatch.setattr(sys, "was_run", False, raising=False)
    act = "__import__('sys').__setattr__('was_run', True)"
    for code in (act, f"[{act}]", f"1 + {act}", f"x**{act}", f"(lambda: {act})()"):
        assert task.reward(problem, f"<answer>{code}</answer>") == 0.0
        assert not sys.was_run
    for slow in ("9**9**9**9", "((9**99)**99)**99", "9**(99*99*99*99)", "factorial(10**9)"):
        assert task.reward(problem, f"<answer>{slow}</answer>") == 0.0
        assert not harmless(name, slow)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - NOT_THE_ANSWER))
def test_every_evaluating_scorer_is_known(name):
    source = inspect.getsource(sys.modules[DATASETS[name][0].__module__])
    evaluates = any(call in source for call in ("eval(", "exec(", "parse_expr(", "sympify("))
    assert evaluates == (name in TEXT_SCORERS | FORMULA_SCORERS)


@pytest.mark.parametrize(
    "formula", ["(3 + 4)*6 - 2/5", "-x**3/3 + C", "exp(-2*x)*sin(x) + sqrt(x)", "x**(3/2) - 1.5"]
)
def test_formulas_are_harmless(formula):
    assert harmless("simple_integration", formula)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        pytest.param("leg_countin", "leg_counting", id="misspelt"),
        pytest.param("zzzz", "ab, .*zebra_puzzles", id="nothing close: all"),
        pytest.param("composite", "complex_arithmetic", id="needs a configuration"),
    ],
)
def test_unknown_names_list_close_ones(name, close):
    with pytest.raises(ValueError, match=f"{name!r}; there is {close}"):
        gym(name)


def test_instruction_and_template():
    class Tokenizer:
        chat_template = "yes"

        def apply_chat_template(self, messages, **options):
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return f"<user>{messages[0]['content']}<assistant>"

    data = Data(task="gym:leg_counting", instruction="Think.")
    plain = make_task(data, 0).problem("train", 0).prompt
    assert plain.endswith("\n\nThink.")
    chat = make_task(data, 0, Tokenizer()).problem("train", 0).prompt
    assert chat == f"<user>{plain}<assistant>"


def test_another_version_of_the_library_is_other_data(monkeypatch):
    """Which a run that resumes is told of (trainer/checkpoint/resume.py)."""
    before = Gym("basic_arithmetic", 0, Data(), None).digest
    assert before == Gym("basic_arithmetic", 1, Data(), None).digest
    monkeypatch.setattr("trainer.tasks.gym.version", lambda name: "99.0")
    assert Gym("basic_arithmetic", 0, Data(), None).digest == "reasoning-gym 99.0" != before
