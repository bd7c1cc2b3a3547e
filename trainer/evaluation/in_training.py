"""Evaluation while a run trains: its held-out problems, and the sets of `eval.data`."""

from statistics import fmean

from trainer.batch import Rollouts
from trainer.evaluation.answers import answers
from trainer.evaluation.estimates import estimate, standard_error
from trainer.evaluation.sets import HELD_OUT, EvaluationSet, metric_names
from trainer.run import Run


def evaluate(run: Run) -> dict[str, float]:
    """`eval.samples` sampled responses and a greedy one to each problem of each set.

    Metrics are "eval/NAME" of the held-out problems and "eval/SET.NAME" of another set, NAME being

    - "accuracy", the share of right responses at `eval.temperature`, `eval.top_k`, `eval.top_p` and
      `eval.min_p`, with its 95% interval "low", "high" and its "standard_error" over problems;
      "greedy", "greedy_low", "greedy_high";
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
    shares = one.shares(sampled, asked.samples)
    accuracy = estimate(shares, asked.samples)
    best = estimate(one.shares(greedy, 1), 1)
    return {
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "standard_error": standard_error(shares),
        "greedy": best.value,
        "greedy_low": best.low,
        "greedy_high": best.high,
        "problems": float(len(shares)),
        "reward": fmean(sampled.reward_B.tolist()),
        "length": fmean(sampled.response_length_B.tolist()),
        "truncated": fmean(sampled.truncated_B.tolist()),
        "timeouts": float(sampled.timed_out_B.sum() + greedy.timed_out_B.sum()),
        "crashes": float(sampled.crashed_B.sum() + greedy.crashed_B.sum()),
    }


def _answers(run: Run, one: EvaluationSet, samples: int, temperature: float) -> Rollouts:
    """`samples` responses to each problem, no more at a time than a step samples."""
    rollout = run.settings.rollout
    portions = answers(
        one,
        run.engine,
        run.policy,
        run.ranks,
        samples=samples,
        max_new_tokens=run.settings.eval.max_new_tokens or rollout.max_new_tokens,
        temperature=temperature,
        truncation=run.settings.eval.truncation,
        at_once=rollout.prompts * rollout.group_size,
    )
    return Rollouts.concatenate(list(portions))
