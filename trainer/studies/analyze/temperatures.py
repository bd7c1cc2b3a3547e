"""Accuracy over two temperatures, one for high-entropy tokens and one for the others: Figure 3 of
"Beyond the 80/20 Rule"."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import entropy_kernels as ek
from entropy_kernels.backends import beside_head
from trainer.engines.engine import Engine
from trainer.evaluation.command import Opened, engine_config, samples_of
from trainer.evaluation.estimates import estimate
from trainer.log import provenance, replace_text
from trainer.report.charts import Mark, Panel, Series, figure
from trainer.report.progress import progress
from trainer.studies.analyze.analysis import Analysis, opened
from trainer.studies.analyze.responses import responses, scored_responses
from trainer.studies.two_temperature_engines import make_engine
from trainer.studies.two_temperatures import TwoTemperatures

FILE = "temperatures.json"


@dataclass(frozen=True)
class Temperatures(Analysis):
    """The two temperatures; those of the paper's figure are the default."""

    low: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0)
    """Temperatures of tokens up to the threshold, with 1 for those above it."""
    high: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
    """Temperatures of tokens above the threshold, with 1 for the others."""
    threshold: float = 0.0
    """The threshold in nats; 0: measured first, that of the top `fraction` at temperature 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1:
            raise ValueError(f"temperature must be 1 in a sweep of two; got {self.temperature}")
        for low, high in self.pairs():
            TwoTemperatures(self.threshold, low, high)

    def pairs(self) -> list[tuple[float, float]]:
        """(low, high) of every point, each once."""
        pairs = [(low, 1.0) for low in self.low] + [(1.0, high) for high in self.high]
        return list(dict.fromkeys(pairs))


def analyze_temperatures(settings: Temperatures) -> Path:
    """Sample with each pair of temperatures, and write OUT/temperatures.json and temperatures.svg.

    temperatures.json: "threshold", nats, and "points": "low", "high", "accuracy" {"value", "low",
    "high"}, a 95% interval over its "problems", "length" and "truncated". Points that it has with
    the same settings are not sampled again. Returns its path.
    """
    with opened(settings) as work:
        found = _found(work)
        if found is None:
            found = {
                "settings": _plain(work.settings),
                "made": provenance(str(work.ranks.device)),
                "threshold": settings.threshold or _threshold(work),
                "points": [],
            }
            _write(work.folder, found)
        for point in _points(work, found):
            found["points"].append(point)
            _write(work.folder, found)
    _show(found)
    print(f"results: {work.folder / FILE}")
    return work.folder / FILE


def draw(found: dict[str, Any], source: str) -> str:
    """Accuracy over each of the two temperatures, the other being 1, as an SVG."""

    def series(label: str, varied: str, color: int) -> Series:
        other = "high" if varied == "low" else "low"
        marks = [
            Mark(point[varied], *(point["accuracy"][key] for key in ("value", "low", "high")))
            for point in found["points"]
            if point[other] == 1
        ]
        return Series(label, sorted(marks), color)

    lines = [series("T_high varied", "high", 0), series("T_low varied", "low", 1)]
    return figure([Panel("accuracy", "temperature (the other is 1)", lines, zero=True)], source)


def _plain(settings: Temperatures) -> dict[str, Any]:
    """The settings that must not change between calls: all but the sweep's and those of speed."""
    free = ("low", "high", "out", "batch_size", "device", "impl", "workers")
    plain = {name: value for name, value in asdict(settings).items() if name not in free}
    return json.loads(json.dumps(plain))


def _found(work: Opened[Temperatures]) -> dict[str, Any] | None:
    """The results of an earlier call; None if there was none.

    Raises ValueError where it was made with other settings.
    """
    path = work.folder / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        now, before = _plain(work.settings), dict(found["settings"])
        found["threshold"], found["points"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}; choose another --out, or delete it"
        ) from error
    names = [name for name in now if now[name] != before.get(name)]
    if names:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(names)}); choose another --out, or "
            "delete it"
        )
    return found


def _threshold(work: Opened[Temperatures]) -> float:
    threshold = ek.StreamingThreshold(work.settings.fraction, impl=beside_head(work.settings.impl))
    for scored in scored_responses(work):
        threshold.update(scored.entropy_T)
    return float(threshold.value())


def _points(work: Opened[Temperatures], found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The points that `found` lacks."""
    have = {(point["low"], point["high"]) for point in found["points"]}
    waiting = [pair for pair in work.settings.pairs() if pair not in have]
    if not waiting:
        return
    first = TwoTemperatures(found["threshold"], *waiting[0])
    engine = make_engine(engine_config(work.settings), work.policy, first)
    engine.update_weights(work.policy.weights())
    with closing(engine), progress("temperatures", len(waiting), columns={}) as bar:
        for done, (low, high) in enumerate(waiting, start=1):
            engine.two = TwoTemperatures(found["threshold"], low, high)
            yield {"low": low, "high": high, **_accuracy(work, engine)}
            bar.update(done, {})


def _accuracy(work: Opened[Temperatures], engine: Engine) -> dict[str, Any]:
    shares, lengths, truncated = [], [], []
    for one, rollouts in responses(work, engine):
        shares += one.shares(rollouts, samples_of(work.settings))
        lengths += rollouts.response_length_B.tolist()
        truncated += rollouts.truncated_B.tolist()
    return {
        "accuracy": estimate(shares, samples_of(work.settings))._asdict(),
        "problems": len(shares),
        "length": sum(lengths) / len(lengths),
        "truncated": sum(truncated) / len(truncated),
    }


def _write(folder: Path, found: dict[str, Any]) -> None:
    replace_text(folder / FILE, json.dumps(found, indent=1) + "\n")
    if found["points"]:
        replace_text(folder / "temperatures.svg", draw(found, FILE))


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"two temperatures, threshold {found['threshold']:.3f} nats")
    titles = ("T_low", "T_high", "problems", "accuracy", "95% interval", "length", "truncated")
    for title in titles:
        table.add_column(title, justify="right")
    for point in found["points"]:
        accuracy = point["accuracy"]
        table.add_row(
            f"{point['low']:g}",
            f"{point['high']:g}",
            str(point["problems"]),
            f"{accuracy['value']:.1%}",
            f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
            f"{point['length']:.1f}",
            f"{point['truncated']:.1%}",
        )
    Console().print(table)
