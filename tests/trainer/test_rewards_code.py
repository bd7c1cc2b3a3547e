"""No text of a model runs as code: many calls in many places of an answer to mathematics.

What is evaluated at all, and how, differs by verifier: reasoning-gym's are in test_gym.py.
"""

import json
import subprocess
import sys

import pytest

from tests.trainer import hostile_answers
from trainer.rewards.pool import Pool

# Parts of the calls. None of them is in what SymPy compiles for reasons of its own.
FRAGMENTS = ("__import__", "__base__", "system", "open(", "open (", "lambda:", "exit", "touch")


def run_all(function: str, responses: list[str], gold: str) -> list[str]:
    """Failures of `function`, in a process of its own, on `responses`."""
    pool = Pool(function, 2, seconds=20.0, gigabytes=4.0)
    requests = [{"prompt": "", "response": text, "answer": gold} for text in responses]
    failures = [outcome.failure for outcome in pool.run(requests)]
    pool.close()
    return failures


def test_no_response_runs_in_the_verifiers_process(tmp_path):
    file = tmp_path / "was_run"
    responses = hostile_answers.responses(str(file))
    assert len(responses) > 300
    failures = run_all(
        "trainer.tasks.math_answers:math_verifier", responses, hostile_answers.GOLDS[1]
    )
    assert set(failures) == {""}
    assert not file.exists()


@pytest.mark.parametrize("number", range(5))
def test_the_calls_would_run_if_they_were_evaluated(number, tmp_path):
    """The test above can fail."""
    file = tmp_path / "was_run"
    call = hostile_answers.CALLS[number].replace("FILE", str(file))
    run_all("tests.trainer.verifiers:evaluating", [call], "2")
    assert file.exists()


def test_only_numbers_and_operators_are_evaluated(tmp_path):
    """SymPy reads numbers, and formulas without letters, with Python's own `eval`.

    An audit hook sees every text that is compiled: the arithmetic is among them, no call is.
    """
    file = tmp_path / "was_run"
    done = subprocess.run(
        [sys.executable, hostile_answers.__file__, str(file)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    result = json.loads(done.stdout)
    assert result["count"] == len(hostile_answers.GOLDS) * len(hostile_answers.responses(""))
    assert "Integer (34 )" in result["compiled"]
    assert [text for text in result["compiled"] if any(part in text for part in FRAGMENTS)] == []
    assert result["effects"] == []
    assert not file.exists()
