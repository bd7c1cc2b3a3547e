"""The sets of problems that a model is evaluated on, during training and by itself."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trainer.batch import Rollouts
from trainer.config import Config, Reward
from trainer.launch.limits import check_length
from trainer.model.tokens import prompt_ids
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.rewards.verifier import Verifier
from trainer.tasks.benchmarks import (
    has_own_columns,
    is_generated,
    make_benchmark,
    short_name,
)
from trainer.tasks.contamination import count_seen
from trainer.tasks.problem import Problem, Task
from trainer.tasks.split import stable_hash

HELD_OUT = "held-out"
"""The name of a run's own held-out problems among the sets."""


@dataclass(frozen=True)
class EvaluationSet:
    """Problems and the judge of their answers."""

    name: str
    """Its name in results; `HELD_OUT` for the problems that a run keeps from its training."""
    task: Task
    problems: Sequence[Problem]
    reward: Reward
    """The verifier's settings, and the least verdict on a right answer."""
    verifier: Verifier

    def seed(self, base: int = 0) -> int:
        """The seed of its responses: the same in every run and evaluation."""
        return stable_hash(f"{base}/{self.name}")

    def shares(self, rollouts: Rollouts, samples: int) -> list[float]:
        """The share of right responses among the `samples` to each problem."""
        return self.reward.is_right(rollouts.reward_B).double().view(-1, samples).mean(1).tolist()


def make_set(
    name: str, task: Task, count: int, reward: Reward, verifier: Verifier | None = None
) -> EvaluationSet:
    """The first `count` held-out problems of `task`, or as many as it has, judged by `reward`.

    Raises ValueError where it has none.
    """
    count = min(count, task.num_test)
    if count < 1:
        raise ValueError(f"{name} has no problem to evaluate on; one or more are wanted")
    problems = [task.problem("test", index) for index in range(count)]
    return EvaluationSet(name, task, problems, reward, verifier or Verifier(task, reward))


def own_verdicts(reward: Reward) -> Reward:
    """`reward` for a set with an answer format of its own: its own verifier, right at 1."""
    return replace(reward, function="", right=1.0, failed=None)


def sets_of_run(
    settings: Config, task: Task, verifier: Verifier, policy: Policy, ranks: Ranks
) -> list[EvaluationSet]:
    """What a run is evaluated on: the held-out problems of `task`, then the sets of `eval.data`.

    Sets of "file:" and "hub:" have the run's columns, and so its `reward.function`; all others are
    judged by their own verifiers. Those that call the same function share its processes. Of
    questions that are trained on too the first rank warns.
    Raises ValueError for a set that cannot be read, and for prompts too long for the model.
    """
    asked, reward = settings.eval, settings.reward
    sets = [make_set(HELD_OUT, task, asked.problems, reward, verifier)]
    shared = {_function(task, reward): verifier}
    for name in asked.data:
        own = make_benchmark(name, settings.data, "test", policy.tokenizer)
        judged = own_verdicts(reward) if has_own_columns(name) else reward
        function = _function(own, judged)
        if function not in shared or not function:
            shared[function] = Verifier(own, judged)
            shared[function].start()
        count = asked.problems if is_generated(name) else own.num_test
        sets.append(make_set(short_name(name), own, count, judged, shared[function]))
    metric_names([one.name for one in sets[1:]])
    check_prompts(policy, sets, asked.max_new_tokens or settings.rollout.max_new_tokens)
    if ranks.first:
        _warn_of_training(task, sets[1:])
        warn_of_repeats(sets)
    return sets


def metric_names(names: Sequence[str]) -> dict[str, str]:
    """The prefix of each set's metrics: letters, digits and "_" of the last part of its name.

    "file:data/hard.jsonl" is "hard" there, or "file_data_hard" where another set ends alike.
    Raises ValueError where two cannot be told apart.
    """
    whole = {name: re.sub(r"\.(jsonl?|parquet)$", "", name).rstrip("/") for name in names}
    last = {name: _plain(re.split(r"[/:]", text)[-1]) for name, text in whole.items()}
    alike = list(last.values())
    found = {
        name: last[name] if alike.count(last[name]) == 1 else _plain(text)
        for name, text in whole.items()
    }
    if len(set(found.values())) < len(found):
        raise ValueError(f"eval.data must be sets whose names differ; got {list(names)}")
    return found


def check_prompts(policy: Policy, sets: Iterable[EvaluationSet], max_new_tokens: int) -> None:
    """Refuse, with a ValueError that names the set, prompts that leave no room for a response."""
    name = "eval.max_new_tokens"
    for one in sets:
        try:
            longest = max(map(len, prompt_ids(policy.tokenizer, one.problems)))
            check_length("the model's {} positions", policy.longest, longest, max_new_tokens, name)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from error


def _function(task: Task, reward: Reward) -> str:
    """The function that the verifier's processes call; empty if there are no processes."""
    return reward.function or getattr(task, "verifier", "")


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")


def warn_of_repeats(sets: Iterable[EvaluationSet]) -> None:
    """Warn of problems of each set that repeat an earlier problem."""
    for one in sets:
        asked = [problem.prompt for problem in one.problems]
        repeats = len(asked) - len(set(asked))
        if repeats and hasattr(one.task, "questions"):
            print(
                f"warning: {repeats:,} of {len(asked):,} questions of {one.name} are repeated; its "
                "intervals take them for independent problems, and are too short",
                file=sys.stderr,
            )


def _warn_of_training(task: Task, sets: Iterable[EvaluationSet]) -> None:
    """Warn of questions of each set that stand in the prompts of training."""
    if not hasattr(task, "training_prompts"):
        return
    for one in sets:
        questions = getattr(one.task, "questions", [])
        seen = count_seen(questions, task.training_prompts()) if questions else 0
        if seen:
            print(
                f"warning: {seen} of {len(questions)} questions of {one.name} are in the training "
                f"prompts of {task.name}: accuracy on them does not tell of new problems",
                file=sys.stderr,
            )
