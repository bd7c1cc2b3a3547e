"""What training does to the entropies of the same tokens: section 4 of "Beyond the 80/20 Rule".

C checkpoints, T response tokens of all responses.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.batch import Rollouts
from trainer.evaluation.command import Opened, load
from trainer.report.charts import Mark, Panel, Series, figure
from trainer.studies.analyze.analysis import Analysis, opened, scoring, write
from trainer.studies.analyze.overlap import change_by_bin, overlap, rank_correlation, top_mask
from trainer.studies.analyze.responses import own_responses
from trainer.update import score

PERCENTILES = tuple(range(0, 101, 5))
LOW = 0.01


@dataclass(frozen=True)
class Evolution(Analysis):
    """The entropies of one model's responses under several checkpoints."""

    checkpoints: tuple[str, ...] = ()
    """Models or checkpoints in the order of training, the base first; by default the checkpoints of
    the run `model`. The responses are those of `model`."""
    bins: int = 20
    """The number of bins of the base's entropies, each with as many tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1; got {self.bins}")


def analyze_evolution(settings: Evolution) -> Path:
    """Sample from the last model, score the same responses under each checkpoint, and compare.

    Writes OUT/evolution.json and evolution.svg, and returns the path of the first. It has

    - "checkpoints" by name with their "mean", "below_0.01" and "percentiles" of entropy, nats;
    - "overlap"[a][b], the share of the top `fraction` of checkpoint b that the top of a catches;
    - "correlation" of ranks with the base;
    - "distance", the mean |log-ratio| of the sampled tokens to the checkpoint before;
    - "bins", the change of entropy from base to last by percentile of the base.

    Holds two numbers per token and checkpoint.

    Raises:
        ValueError: fewer than two checkpoints, or one with another vocabulary.
    """
    names = settings.checkpoints or _kept(Path(settings.model))
    if len(names) < 2:
        raise ValueError(
            f"an evolution needs two checkpoints or more; got {', '.join(names) or 'none'}"
        )
    with opened(settings) as work:
        portions = [rollouts for _, rollouts in own_responses(work)]
        logprob_CT, entropy_CT = _scored(work, names, portions)
        labels = [Path(name).name for name in names]
        if len(set(labels)) < len(labels):
            labels = list(names)
        found = compare(entropy_CT, logprob_CT, settings.fraction, settings.bins)
        return _write(work, {"tokens": entropy_CT.shape[1], "names": labels, **found})


def compare(entropy_CT: Tensor, logprob_CT: Tensor, fraction: float, bins: int) -> dict[str, Any]:
    """The entries of evolution.json on the entropies, in nats, and log-probs of the same tokens."""
    masks = [top_mask(entropy_T, fraction) for entropy_T in entropy_CT]
    base_T = entropy_CT[0]
    ratio_CT = logprob_CT[1:] - logprob_CT[:-1]
    return {
        "mean": [float(x.double().mean()) for x in entropy_CT],
        "below_0.01": [float((x < LOW).double().mean()) for x in entropy_CT],
        "percentiles": [_percentiles(x) for x in entropy_CT],
        "overlap": [[overlap(a, b) for b in masks] for a in masks],
        "correlation": [rank_correlation(base_T, x) for x in entropy_CT],
        "distance": [0.0, *(float(x.double().abs().mean()) for x in ratio_CT)],
        "bins": change_by_bin(base_T, entropy_CT[-1], bins),
    }


def draw(found: dict[str, Any], source: str) -> str:
    """Overlap, change by bin and percentiles of an evolution.json, as an SVG."""
    count = len(found["names"])
    steps = [re.fullmatch(r"step-(\d+)", name) for name in found["names"]]
    # RL steps if all are checkpoints of a run, otherwise their places.
    xs = [int(step.group(1)) for step in steps if step] if all(steps) else list(range(count))
    places = range(count)

    def line(label: str, values: Sequence[float], color: int, style: str = "") -> Series:
        marks = [Mark(x, *[y] * 3) for x, y in zip(xs, values, strict=True)]
        return Series(label, marks, color, style)

    last = count - 1
    overlaps = [
        line("with base", [found["overlap"][c][0] for c in places], 0),
        line("with last", [found["overlap"][c][last] for c in places], 1),
    ]
    size = 100 / len(found["bins"])
    change = [Mark((i + 0.5) * size, *[bin_["change"]] * 3) for i, bin_ in enumerate(found["bins"])]
    percentiles = [
        line(f"p{p}", [own[str(p)] for own in found["percentiles"]], i, "thin" * (p != 80))
        for i, p in enumerate((50, 80, 85, 90, 95, 100))
    ]
    return figure(
        [
            Panel("overlap of the top tokens", "checkpoint", overlaps),
            Panel(
                "entropy, last less base, nats",
                "percentile of the base's entropy",
                [Series("mean of a bin", change, 1)],
            ),
            Panel("percentiles of entropy, nats", "checkpoint", percentiles, zero=True),
        ],
        source,
    )


def _kept(folder: Path) -> tuple[str, ...]:
    """The checkpoints of the run in `folder`, oldest first."""
    if not (found := sorted((folder / "checkpoints").glob("step-*"))):
        raise ValueError(
            f"{folder} is no run with checkpoints; name them with --checkpoints BASE ... LAST"
        )
    return tuple(map(str, found))


def _scored(
    work: Opened[Evolution], names: Sequence[str], portions: Sequence[Rollouts]
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [C, T] of the responses under each of the models in `names`."""
    settings, config, found = work.settings, scoring(work.settings), []
    for name in names:
        other = load(replace(settings, model=name), work.ranks)
        if other.tokenizer.get_vocab() != work.policy.tokenizer.get_vocab():
            raise ValueError(
                f"{name} has another vocabulary than {settings.model}: the same tokens are wanted"
            )
        parts = []
        for rollouts in portions:
            scores = score(other, rollouts, config, work.ranks)
            parts.append(torch.stack([scores.logprob_T, scores.entropy_T]).cpu())
        found.append(torch.cat(parts, 1))
    logprob_CT, entropy_CT = torch.stack(found, 1)
    return logprob_CT, entropy_CT


def _percentiles(entropy_T: Tensor) -> dict[str, float]:
    """Percentiles by numpy: `torch.quantile` takes 16 million values at most."""
    found = np.percentile(entropy_T.cpu().numpy(), PERCENTILES)
    return {str(p): float(value) for p, value in zip(PERCENTILES, found, strict=True)}


def _write(work: Opened[Evolution], found: dict[str, Any]) -> Path:
    table = Table(title=f"top {work.settings.fraction:.0%} of {found['tokens']:,} tokens")
    for title in ("checkpoint", "overlap with base", "with last", "mean entropy", "below 0.01"):
        table.add_column(title, justify="left" if title == "checkpoint" else "right")
    for c, name in enumerate(found["names"]):
        shares = found["overlap"][c]
        mean, below = found["mean"][c], found["below_0.01"][c]
        table.add_row(name, f"{shares[0]:.2%}", f"{shares[-1]:.2%}", f"{mean:.3f}", f"{below:.1%}")
    Console().print(table)
    return write(work, "evolution", found, draw(found, "evolution.json"))
