"""Who scores a response, and what is made of failures; real tasks in their processes."""

import logging

import pytest
import torch

from tests.trainer.small import EVEN, Even, build_policy, sampled, settings
from trainer.config import Data, Reward
from trainer.rewards.verifier import Verifier
from trainer.tasks import make_task
from trainer.tasks.problem import Problem
from trainer.train import train

SCRIPTED = "tests.trainer.verifiers:scripted"


class WithVerifier(Even):
    """Its `reward` must not be asked."""

    verifier = SCRIPTED

    def reward(self, problem, response):
        raise AssertionError


class Mathematics(WithVerifier):
    verifier = "trainer.tasks.math_answers:math_verifier"


def verify(verifier, *responses, answer=None):
    verdicts = verifier.verify([Problem("", answer)] * len(responses), responses)
    verifier.close()
    return verdicts


def test_a_task_without_a_verifier_scores_in_this_process():
    verifier = Verifier(Even(), Reward())
    verifier.start()
    verdicts = verify(verifier, "2", "3")
    assert verdicts.rewards == [1.0, 0.0]
    assert verdicts.timed_out == verdicts.crashed == [False, False]


@pytest.mark.parametrize(
    ("task", "function"), [(WithVerifier(), ""), (Even(), SCRIPTED), (Mathematics(), SCRIPTED)]
)
def test_others_score_in_processes_and_a_function_of_ones_own_comes_first(task, function):
    verifier = Verifier(task, Reward(function=function, seconds=3.0, workers=2))
    verdicts = verify(verifier, "0.5", "hang", "exit", "-2")
    assert verdicts.rewards == [0.5, 0.0, 0.0, -2.0]
    assert verdicts.timed_out == [False, True, False, False]
    assert verdicts.crashed == [False, False, True, False]


def test_a_failure_is_no_better_than_a_wrong_answer(caplog):
    """A verifier of -1 and 1, and one whose right answers begin at 0."""
    for right, failed, scores in ((1.0, -1.0, -1.0), (0.0, None, -1.0), (1.0, None, 0.0)):
        settings = Reward(SCRIPTED, right=right, failed=failed, seconds=3.0, workers=2)
        caplog.clear()
        verdicts = verify(Verifier(Even(), settings), "1", "-1", "hang", "exit")
        assert verdicts.rewards == [1.0, -1.0, scores, scores]
        assert ("failed on 2 answers, which score 0, more than" in caplog.text) == (scores == 0)
        assert settings.is_right(torch.tensor(verdicts.rewards)).tolist() == [True] + [False] * 3
    with pytest.raises(
        ValueError, match=r"reward\.failed must be a finite number below .* got 0\.0"
    ):
        Reward(right=0.0, failed=0.0)


def test_the_first_crash_is_shown_and_no_more(caplog):
    verifier = Verifier(WithVerifier(), Reward(workers=1))
    with caplog.at_level(logging.WARNING):
        verifier.verify([Problem("", None)] * 2, ["raise", "1"])
        verify(verifier, "raise", "1")
    (record,) = caplog.records
    assert f"{SCRIPTED} failed on an answer: Traceback" in record.message
    assert "RuntimeError: of no use" in record.message


def test_a_function_that_always_fails_is_an_error():
    reward = Reward(function="tests.trainer.verifiers:always_fails", workers=1)
    verdicts = verify(Verifier(Even(), reward), *["1"] * 15)
    assert verdicts.crashed == [True] * 15
    with pytest.raises(ValueError, match=r"(?s)always_fails failed on all of 16 .*KeyError: 'col"):
        verify(Verifier(Even(), reward), *["1"] * 16)


def test_a_function_that_cannot_be_imported_is_an_error_at_the_start():
    verifier = Verifier(Even(), Reward(function="no.such.module:f"))
    with pytest.raises(ValueError, match=r"no\.such\.module:f: cannot import"):
        verifier.start()


def test_a_run_does_not_start_with_a_function_that_cannot_be_imported(tmp_path):
    with pytest.raises(ValueError, match=r"no\.such\.module:f: cannot import"):
        train(settings(tmp_path, reward=Reward(function="no.such.module:f")))
    assert not list(tmp_path.iterdir())


def test_rollouts_tell_what_failed():
    policy = build_policy(spread=0.1)
    reward = Reward(function="tests.trainer.verifiers:even_or_worse", seconds=3.0)
    options = {"group_size": 8, "max_new_tokens": 4, "seed": 1}
    rollouts = sampled(policy, EVEN[:4], verifier=Verifier(Even(), reward), **options)
    first = [response[:1] for response in rollouts.responses]
    assert rollouts.timed_out_B.tolist() == [one in ("7", "=") for one in first]
    assert rollouts.crashed_B.tolist() == [one in ("9", "+") for one in first]
    assert rollouts.reward_B.tolist() == [float(one in tuple("02468")) for one in first]
    assert rollouts.timed_out_B.any()
    assert rollouts.crashed_B.any()
    assert rollouts.reward_B.any()


def test_mathematics():
    """A power tower hangs SymPy; powers of ten take its memory; neither costs another answer."""
    verifier = Verifier(Mathematics(), Reward(seconds=6.0, gigabytes=1.0, workers=2))
    tower, bomb, deep = "9^{9^{9^{9}}}", "10^{10^{10}}", "(" * 20_000
    boxes = [f"\\boxed{{{text}}}" for text in ("2", tower, "2.0", bomb, "3", deep, "\\frac{4}{2}")]
    verdicts = verify(verifier, *boxes, "\\boxed{" * 15_000, answer="2")
    assert verdicts.rewards == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert verdicts.timed_out[1]
    assert not any(verdicts.timed_out[index] for index in (0, 2, 4, 6))
    assert not any(verdicts.crashed[index] for index in (0, 2, 4, 6))


@pytest.mark.parametrize("name", ["leg_counting", "spiral_matrix"])
def test_reasoning_gym(name):
    """The process has the task's verdicts, whatever the seed and settings of the task."""
    pytest.importorskip("reasoning_gym", reason="the extra [gym] is not installed")
    task = make_task(Data(task=f"gym:{name}", instruction="Think."), 5)
    problems = [task.problem(split, i) for split in ("train", "test") for i in range(4)]
    right = [f"<answer>{problem.answer['answer']}</answer>" for problem in problems]
    verifier = Verifier(task, Reward(workers=1))
    verdicts = verifier.verify([*problems, problems[0]], [*right, "<answer>none</answer>"])
    verifier.close()
    assert verdicts.rewards == [1.0] * 8 + [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"seconds": 0.0}, "reward.seconds must be > 0; got 0.0"),
        ({"right": float("nan")}, "reward.right must be a finite number; got nan"),
        ({"gigabytes": -1.0}, "reward.gigabytes must be > 0; got -1.0"),
        ({"format": "(a"}, 'reward.format must be "boxed", "answer" or a regular expression; got'),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Reward(**options)
