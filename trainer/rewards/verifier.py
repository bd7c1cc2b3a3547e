"""Verdicts on responses: by the task where that is cheap and safe, otherwise by processes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import Reward
from trainer.rewards.pool import Outcome, Pool
from trainer.rewards.worker import as_verdict
from trainer.tasks.problem import Problem, Task

ALL_FAIL = 16
"""If all answers of a call with at least this many crash, the function is at fault."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on a list of responses, in their order."""

    rewards: list[float]
    timed_out: list[bool]
    """Whether the verifier took over `reward.seconds`; the reward is then `reward.failed`."""
    crashed: list[bool]
    """Whether it raised, ended its process or ran out of memory; reward as above."""


class Verifier:
    """Scores responses by `settings.function`, the task's `verifier`, or the task's `reward`.

    The first two name a "module:function" and run in processes of their own. There an answer that
    hangs or crashes scores `reward.failed`, is counted, and costs no other. The third runs here, so
    it must do neither. Nothing in a response is ever evaluated as code by the tasks' own verifiers.
    """

    def __init__(self, task: Task, settings: Reward):
        self._task = task
        self._failed = settings.verdict_on_failure
        self.keep_special_tokens = settings.keep_special_tokens
        self._warned = self._warned_of_score = False
        function = settings.function or getattr(task, "verifier", "")
        self._pool = (
            Pool(function, settings.workers, settings.seconds, settings.gigabytes)
            if function
            else None
        )

    def start(self) -> None:
        """Import the function in a process that stays; raises ValueError if that fails."""
        if self._pool is not None:
            self._pool.start()

    def close(self) -> None:
        """End the processes, as the end of the program does."""
        if self._pool is not None:
            self._pool.close()

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> Verdicts:
        """One verdict per response.

        Raises ValueError where the function cannot be imported, returns what is no verdict
        (`as_verdict`), or crashes on every one of at least 16 answers. That is a defect of the
        function, and the reward of a wrong answer would hide it.
        """
        pairs = list(zip(problems, responses, strict=True))
        if self._pool is None:
            rewards = [self._ask_task(problem, response) for problem, response in pairs]
            return Verdicts(rewards, [False] * len(pairs), [False] * len(pairs))
        outcomes = self._pool.run(
            [
                {"prompt": problem.prompt, "response": response, "answer": problem.answer}
                for problem, response in pairs
            ]
        )
        crashes = [outcome.message for outcome in outcomes if outcome.failure == "crash"]
        if len(crashes) == len(outcomes) >= ALL_FAIL:
            raise ValueError(
                f"{self._pool.function} failed on all of {len(crashes)} answers; the last: "
                f"{crashes[-1]}"
            )
        if crashes and not self._warned:
            self._warned = True
            _log.warning("%s failed on an answer: %s", self._pool.function, crashes[0])
        self._compare_failures(outcomes)
        return Verdicts(
            [self._failed if outcome.failure else outcome.reward for outcome in outcomes],
            [outcome.failure == "timeout" for outcome in outcomes],
            [outcome.failure == "crash" for outcome in outcomes],
        )

    def _compare_failures(self, outcomes: Sequence[Outcome]) -> None:
        """Warn, once, if a failure scores more than an answer."""
        given = [outcome.reward for outcome in outcomes if not outcome.failure]
        failed = len(outcomes) - len(given)
        if failed and given and min(given) < self._failed and not self._warned_of_score:
            self._warned_of_score = True
            _log.warning(
                "the verifier failed on %d answers, which score %g, more than the least verdict, "
                "%g: set reward.failed to that of a wrong answer",
                failed,
                self._failed,
                min(given),
            )

    def _ask_task(self, problem: Problem, response: str) -> float:
        value = self._task.reward(problem, response)
        try:
            return as_verdict(value)
        except ValueError as error:
            raise ValueError(
                f"{type(self._task).__name__}.reward {error} for the prompt "
                f"{problem.prompt!r:.500}, response {response!r:.500}"
            ) from error
