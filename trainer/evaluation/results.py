"""The results of an evaluation: results.json, and a table like the paper's Table 2."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.config import Reward, Truncation
from trainer.evaluation.estimates import (
    Estimate,
    average,
    estimate,
    majority,
    pass_at_k,
    powers_up_to,
    standard_error,
)
from trainer.evaluation.generations import rows
from trainer.evaluation.sets import EvaluationSet
from trainer.log import provenance, replace_text
from trainer.tasks.answers import final_answer

PERCENTILES = (50, 90, 99)
_PLAIN_WIDTH = 160  # The table's width in a file or a pipe, which has none of its own.

Row = Mapping[str, Any]


def write_results(
    folder: Path, settings: Mapping[str, Any], asked: Mapping[str, EvaluationSet], device: str
) -> dict[str, Any]:
    """Write `folder`/results.json from generations.jsonl, and return what it says.

    "sets" has for each set of `asked` what `summarize` returns, and "average" the unweighted mean
    over the sets.
    """
    found: dict[str, list[Row]] = {name: [] for name in asked}
    for row in rows(folder, {name: len(one.problems) for name, one in asked.items()}):
        found[row["data"]].append(_numbers(row))
    sampled = settings["temperature"] > 0
    sets = {name: summarize(own, asked[name].reward, sampled) for name, own in found.items()}
    results = {
        "settings": dict(settings),
        "made": provenance(device),
        "sets": sets,
        "average": _average(list(sets.values())),
    }
    text = json.dumps(results, indent=2, default=list) + "\n"
    replace_text(folder / "results.json", text)
    return results


class Tally:
    """The standing of one set's evaluation, in the same numbers as its results."""

    def __init__(self, reward: Reward):
        self._reward = reward
        self._shares: list[float] = []
        self._responses: list[Row] = []

    def add(self, row: Row) -> None:
        """Count a line of generations.jsonl."""
        responses = row["responses"]
        self._responses += [
            {name: one[name] for name in ("reward", "length", "truncated")} for one in responses
        ]
        self._shares.append(fmean(self._reward.is_right(one["reward"]) for one in responses))

    def metrics(self) -> dict[str, float]:
        """Accuracy with the ends of its interval, length, truncation, and the mean verdict where
        it is another number than the accuracy."""
        samples = len(self._responses) // len(self._shares)
        found = estimate(self._shares, samples)
        mean = {name: fmean(one[name] for one in self._responses) for name in self._responses[0]}
        if math.isclose(mean["reward"], found.value):
            del mean["reward"]
        return {"accuracy": found.value, "low": found.low, "high": found.high, **mean}


def summarize(rows: Sequence[Row], reward: Reward, sampled: bool = True) -> dict[str, Any]:
    """Results of one set's rows in generations.jsonl, n responses each, judged by `reward`:

    "avg@n", the share of right responses, with its standard error; "pass@k" for k = 1, 2, 4, ...,
    n; "maj@n", the accuracy of the most frequent answer. Each is {"value", "low", "high"}, a 95%
    confidence interval over problems. "right", the verdict from which on an answer is right, and
    "reward", the mean verdict. "length" in tokens: mean, percentiles and maximum. "truncated", the
    share that the length limit cut. "timeouts" and "crashes" of the verifier, which count as wrong.
    "entropy", in nats per token: the mean of -log p over the sampled tokens, which estimates that
    of the distributions that were sampled from. Greedy ones have none.
    """
    samples = len(rows[0]["reward"])
    right = [sum(map(reward.is_right, row["reward"])) for row in rows]
    accuracy = [count / samples for count in right]
    lengths = np.array([row["length"] for row in rows])
    logprob = sum(sum(row["logprob"]) for row in rows)
    votes = [majority(row["answers"], list(map(reward.is_right, row["reward"]))) for row in rows]
    summary: dict[str, Any] = {
        "problems": len(rows),
        "samples": samples,
        f"avg@{samples}": estimate(accuracy, samples)._asdict(),
        "standard_error": standard_error(accuracy),
        "right": reward.right,
        "reward": fmean(verdict for row in rows for verdict in row["reward"]),
    }
    for k in powers_up_to(samples):
        chances = [pass_at_k(count, samples, k) for count in right]
        summary[f"pass@{k}"] = estimate(chances, samples)._asdict()
    summary[f"maj@{samples}"] = estimate(votes, samples)._asdict()
    summary["length"] = {
        "mean": float(lengths.mean()),
        **{f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES},
        "max": int(lengths.max()),
    }
    summary["truncated"] = fmean(cut for row in rows for cut in row["truncated"])
    summary["timeouts"] = sum(sum(row["timed_out"]) for row in rows)
    summary["crashes"] = sum(sum(row["crashed"]) for row in rows)
    if sampled:
        summary["entropy"] = -logprob / int(lengths.sum())
    return summary


def show(results: Mapping[str, Any]) -> None:
    """Print `results` as a table, one row a set and their average."""
    sets, samples = results["sets"], results["settings"]["samples"]
    several = [f"pass@{k}" for k in powers_up_to(samples) if k > 1]
    chances = [*several, f"maj@{samples}"]
    # With verdicts of 0 and 1 it repeats the accuracy.
    partial = not all(
        math.isclose(own["reward"], own[f"avg@{samples}"]["value"]) for own in sets.values()
    )
    asked = results["settings"]
    truncation = Truncation(asked["top_k"], asked["top_p"], asked["min_p"])
    how = str(truncation) if asked["temperature"] else "greedy"
    table = Table(title=", ".join(filter(None, (asked["model"], how))))
    table.add_column("data")
    for title in ("problems", f"acc@{samples}", "95% interval", f"len@{samples}", "truncated"):
        table.add_column(title, justify="right")
    for title in [*chances, "reward"] if partial else chances:
        table.add_column(title, justify="right")
    for name, own in sets.items():
        table.add_row(*_cells(name, own, samples, chances, partial))
    if len(sets) > 1:
        table.add_section()
        table.add_row(*_cells("average", results["average"], samples, chances, partial))
    console = Console()
    (console if console.is_terminal else Console(width=_PLAIN_WIDTH)).print(table)
    for name, own in sets.items():
        failed = {"timed out": own["timeouts"], "crashed": own["crashes"]}
        if said := " and ".join(f"{how} on {n:,}" for how, n in failed.items() if n):
            of = own["problems"] * own["samples"]
            print(f"warning: {name}: the verifier {said} of {of:,} responses; these count as wrong")


def _numbers(row: Row) -> Row:
    """The parts of a row that `summarize` needs, without the texts."""
    responses = row["responses"]
    names = ("reward", "length", "truncated", "logprob", "timed_out", "crashed")
    return {
        **{name: [response[name] for response in responses] for name in names},
        # Blanks and case change no answer.
        "answers": ["".join(final_answer(r["text"]).split()).casefold() for r in responses],
    }


def _average(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Unweighted means over the sets."""
    means: dict[str, Any] = {"problems": sum(own["problems"] for own in sets)}
    for key, value in sets[0].items():
        if isinstance(value, dict) and "low" in value:
            means[key] = average([Estimate(**own[key]) for own in sets])._asdict()
    means["reward"] = fmean(own["reward"] for own in sets)
    means["length"] = {"mean": fmean(own["length"]["mean"] for own in sets)}
    means["truncated"] = fmean(own["truncated"] for own in sets)
    return means


def _cells(
    name: str, own: Mapping[str, Any], samples: int, chances: Sequence[str], partial: bool
) -> list[str]:
    accuracy = own[f"avg@{samples}"]
    return [
        name,
        str(own["problems"]),
        f"{accuracy['value']:.2%}",
        f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
        f"{own['length']['mean']:,.0f}",
        f"{own['truncated']:.1%}",
        *(f"{own[key]['value']:.1%}" for key in chances),
        *([f"{own['reward']:.4g}"] if partial else []),
    ]
