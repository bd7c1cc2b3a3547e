"""Evaluation while a run trains: its held-out problems, and the sets of `eval.data`."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from trainer.evaluation.estimates import estimate, standard_error
from trainer.evaluation.sets import HELD_OUT, EvaluationSet, metric_names
from trainer.run import Run
from trainer.sampling import sample


class _Answers(NamedTuple):
    """`samples` responses to each problem of one set, in the order of the problems."""

    samples: int
    rewards: list[float]
    lengths: list[float]
    truncated: list[bool]
    failures: tuple[int, int]
    """How often the verifier timed out, and how often it crashed."""

    def shares(self, one: EvaluationSet) -> list[float]:
        """The share of right responses to each problem."""
        right = [float(one.reward.is_right(reward)) for reward in self.rewards]
        return [fmean(right[i : i + self.samples]) for i in range(0, len(right), self.samples)]


def evaluate(run: Run) -> dict[str, float]:
    """`eval.samples` sampled responses and a greedy one to each problem of each set.

    Metrics are "eval/NAME" of the held-out problems and "eval/SET.NAME" of another set, NAME being

    - "accuracy", the share of right responses at `eval.temperature`, with its 95% interval "low",
      "high" and its "standard_error" over problems; "greedy", "greedy_low", "greedy_high";
    - "problems", how many were asked; "reward", the mean verdict on sampled responses;
    - of sampled responses "length" in tokens and the share "truncated"; of all, how often the
      verifier ran into its time limit, "timeouts", and failed, "crashes".

    `estimators.estimate` gives the intervals. The problems are the sample: n responses to each make
    the interval shorter by no more than their agreement allows. Random numbers depend on the name
    of the set alone, so evaluations of one run and of different runs share them.
    """
    metrics: dict[str, float] = {}
    labels = metric_names([one.name for one in run.sets if one.name != HELD_OUT])
    for one in run.sets:
        prefix = "eval/" if one.name == HELD_OUT else f"eval/{labels[one.name]}."
        metrics |= {prefix + name: value for name, value in _on(run, one).items()}
    return metrics


def _on(run: Run, one: EvaluationSet) -> dict[str, float]:
    asked = run.settings.eval
    sampled = _answers(run, one, asked.samples, asked.temperature)
    greedy = _answers(run, one, 1, 0.0)
    shares = sampled.shares(one)
    accuracy = estimate(shares, asked.samples)
    best = estimate(greedy.shares(one), 1)
    timeouts, crashes = map(sum, zip(sampled.failures, greedy.failures, strict=True))
    return {
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "standard_error": standard_error(shares),
        "greedy": best.value,
        "greedy_low": best.low,
        "greedy_high": best.high,
        "problems": float(len(shares)),
        "reward": fmean(sampled.rewards),
        "length": fmean(sampled.lengths),
        "truncated": fmean(sampled.truncated),
        "timeouts": float(timeouts),
        "crashes": float(crashes),
    }


def _answers(run: Run, one: EvaluationSet, samples: int, temperature: float) -> _Answers:
    """Sample some problems at a time, with no more responses than a step samples."""
    rollout, asked = run.settings.rollout, run.settings.eval
    size = max(rollout.prompts * rollout.group_size // samples, 1)
    found = _Answers(samples, [], [], [], (0, 0))
    for first in range(0, len(one.problems), size):
        rollouts = sample(
            run.engine,
            run.policy,
            one.verifier,
            one.problems[first : first + size],
            group_size=samples,
            max_new_tokens=asked.max_new_tokens or rollout.max_new_tokens,
            temperature=temperature,
            seed=one.seed(),
            first=first,
            ranks=run.ranks,
        )
        found.rewards.extend(rollouts.reward_B.tolist())
        found.lengths.extend(rollouts.response_length_B.tolist())
        found.truncated.extend(rollouts.truncated_B.tolist())
        failed: Sequence[int] = (int(rollouts.timed_out_B.sum()), int(rollouts.crashed_B.sum()))
        found = found._replace(
            failures=(found.failures[0] + failed[0], found.failures[1] + failed[1])
        )
    return found
