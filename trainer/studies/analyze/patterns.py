"""Entropy patterns of a model's responses: section 3 of "Beyond the 80/20 Rule"."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.evaluation.command import Opened, engine_config, samples_of
from trainer.evaluation.estimates import estimate
from trainer.log import Sample
from trainer.model.tokens import pieces
from trainer.policy import Policy
from trainer.report.charts import Mark, Panel, Series, figure
from trainer.report.progress import Columns, progress
from trainer.studies.analyze.analysis import Analysis, opened, write
from trainer.studies.analyze.responses import Scored, scored_responses
from trainer.studies.analyze.statistics import EntropyStatistics
from trainer.studies.analyze.tokens_page import write_tokens_page

PERCENTILES = (*range(5, 100, 5), 99)
LOW = 0.01
"""The entropy below which the paper calls a token's low, as for 50.64% of Qwen3-8B's tokens."""
HISTOGRAM_BINS = 40
CDF_POINTS = 61
_COLUMNS: Columns = {"mean entropy": (("mean",), ".3f"), "p80": (("p80",), ".3f")}


@dataclass(frozen=True)
class Patterns(Analysis):
    """The entropies of a model's responses, by value and by token."""

    minimum: int = 100
    """Tokens sampled less often are left out of the tables (the paper's 100)."""
    shown: int = 100
    """The number of rows in each table of tokens."""
    coloured: int = 24
    """Responses on the page of coloured tokens: the first of as many problems."""


def analyze_patterns(settings: Patterns) -> Path:
    """Sample, score, and write OUT/patterns.json, patterns.svg and tokens.html.

    patterns.json has

    - "accuracy" with its 95% "accuracy_interval" over "problems"; "count" of tokens;
    - "mean", the share "below_mean" and "below_0.01", "percentiles" and "threshold" of the top
      `fraction` of their entropies, nats;
    - "histogram" (edges, shares) and "cdf" (points, shares below);
    - "tokens", all sampled `minimum` times or more by mean entropy, highest first: "text", "token"
      id, "count", "mean", "share" of all tokens.

    Memory does not grow with the responses. Returns the path of patterns.json.
    """
    with opened(settings) as work:
        vocabulary = work.policy.model.get_output_embeddings().weight.shape[0]
        statistics = EntropyStatistics(vocabulary)
        samples: list[Sample] = []
        shares: list[float] = []
        total = sum(len(one.problems) for one in work.sets.values())
        with progress("problems", total, columns=_COLUMNS) as bar:
            for scored in scored_responses(work):
                statistics.update(scored.rollouts.response_T, scored.entropy_T)
                samples += _samples(scored, work.policy, settings.coloured - len(samples))
                shares += scored.asked.shares(scored.rollouts, samples_of(work.settings))
                p80 = statistics.percentile(80)
                bar.update(len(shares), {"mean": statistics.mean(), "p80": p80})
        accuracy = estimate(shares, samples_of(work.settings))
        found = {
            "accuracy": accuracy.value,
            "accuracy_interval": accuracy[1:],
            "problems": len(shares),
            **summarize(statistics, settings, work.policy),
        }
        return _write(work, found, samples)


def summarize(statistics: EntropyStatistics, settings: Patterns, policy: Policy) -> dict[str, Any]:
    """The entries of patterns.json on `statistics`."""
    most = math.log(len(statistics.count_V))
    top = max(statistics.percentile(100), LOW)
    edges = [top * i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
    edges[-1] = math.inf
    points = [10 ** (-6 + i * (math.log10(most) + 6) / (CDF_POINTS - 1)) for i in range(CDF_POINTS)]
    return {
        "count": statistics.count,
        "mean": statistics.mean(),
        "below_mean": statistics.share_below(statistics.mean()),
        "below_0.01": statistics.share_below(LOW),
        "percentiles": {str(p): statistics.percentile(p) for p in PERCENTILES},
        "threshold": statistics.percentile(100 * (1 - settings.fraction)),
        "histogram": {"edges": edges[:-1], "shares": statistics.shares(edges)},
        "cdf": {"points": points, "shares": [statistics.share_below(p) for p in points]},
        "tokens": [
            {
                "text": policy.tokenizer.decode([token]),
                "token": token,
                "count": count,
                "mean": mean,
                "share": count / statistics.count,
            }
            for token, count, mean in statistics.tokens(settings.minimum)
        ],
    }


def draw(found: dict[str, Any], source: str) -> str:
    """The histogram and the distribution function of a patterns.json, as an SVG."""
    edges, shares = found["histogram"]["edges"], found["histogram"]["shares"]
    histogram = [Mark(x, *[math.log10(y)] * 3) for x, y in zip(edges, shares, strict=True) if y > 0]
    cdf = [
        Mark(x, *[y] * 3)
        for x, y in zip(found["cdf"]["points"], found["cdf"]["shares"], strict=True)
    ]
    threshold = found["threshold"]
    return figure(
        [
            Panel(
                "log10 of the share of tokens",
                "entropy, nats",
                [Series("tokens", histogram, 1)],
                lines=[threshold],
            ),
            Panel(
                "share of tokens below",
                "entropy, nats (dashed: the threshold)",
                [Series("tokens", cdf, 1)],
                log_x=True,
                zero=True,
                lines=[max(threshold, 1e-6)],
            ),
        ],
        source,
    )


def _samples(scored: Scored, policy: Policy, wanted: int) -> list[Sample]:
    """The first response of each problem, up to `wanted`; the selected tokens are marked later."""
    rollouts, found = scored.rollouts, []
    first = [int((rollouts.group_B == group).nonzero()[0]) for group in rollouts.group_B.unique()]
    responses, entropies = map(rollouts.split, (rollouts.response_T, scored.entropy_T))
    for b in first[: max(wanted, 0)]:
        entropy = entropies[b].tolist()
        tokens = pieces(policy.tokenizer, responses[b].tolist())
        found.append(
            Sample(
                rollouts.problems[b].prompt,
                rollouts.responses[b],
                float(rollouts.reward_B[b]),
                tokens,
                entropy,
                [False] * len(entropy),
            )
        )
    return found


def _write(work: Opened[Patterns], found: dict[str, Any], samples: list[Sample]) -> Path:
    settings, threshold = work.settings, found["threshold"]
    marked = [replace(s, selected=[entropy >= threshold for entropy in s.entropy]) for s in samples]
    reward = engine_config(settings).reward
    write_tokens_page(work.folder / "tokens.html", marked, threshold, settings.model, reward)
    _show(found, settings)
    return write(work, "patterns", found, draw(found, "patterns.json"))


def _show(found: dict[str, Any], settings: Patterns) -> None:
    low, high = found["accuracy_interval"]
    print(
        f"accuracy {found['accuracy']:.1%}, 95% interval {low:.1%} to {high:.1%}, of "
        f"{found['problems']:,} problem{'s' * (found['problems'] != 1)} with "
        f"{samples_of(settings)} response{'s' * (samples_of(settings) != 1)} each"
    )
    # Few tokens have most of the entropy, so that 80% and more may lie below the mean of all.
    print(
        f"{found['count']:,} tokens: median entropy {found['percentiles']['50']:.3f} nats, 80th "
        f"percentile {found['percentiles']['80']:.3f}, mean {found['mean']:.3f} "
        f"({found['below_mean']:.1%} of the tokens are below the mean, "
        f"{found['below_0.01']:.1%} below {LOW}); top {settings.fraction:.0%} from "
        f"{found['threshold']:.3f} on"
    )
    if not found["tokens"]:
        print(f"no token was sampled {settings.minimum} times or more (--minimum)")
        return
    table = Table(title=f"tokens sampled {settings.minimum} times or more")
    for title in ("highest", "entropy", "count", "lowest", "entropy", "count"):
        table.add_column(title, justify="left" if title in ("highest", "lowest") else "right")
    tokens = found["tokens"]
    count = min(settings.shown, len(tokens) // 2 or len(tokens))
    for high, low in zip(tokens[:count], tokens[::-1][:count], strict=True):
        cells = (_cells(high), _cells(low))
        table.add_row(*cells[0], *cells[1])
    Console().print(table)


def _cells(token: dict[str, Any]) -> tuple[str, str, str]:
    return repr(token["text"]), f"{token['mean']:.3f}", f"{token['count']:,}"
