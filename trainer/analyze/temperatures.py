"""Accuracy over two temperatures, one for high-entropy tokens and one for the others: Figure 3 of
"Beyond the 80/20 Rule"."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import entropy_kernels as ek
from trainer.analyze.folder import out_folder
from trainer.analyze.responses import scored_responses
from trainer.engines import Engine, make_engine
from trainer.estimators import estimate
from trainer.evaluation import (
    Asked,
    Evaluation,
    engine_config,
    load,
    problems_of,
    resolved,
    with_limit,
)
from trainer.figures import Mark, Panel, Series, figure
from trainer.log import provenance, replace_text
from trainer.policy import Policy
from trainer.progress import progress
from trainer.ranks import Ranks, join
from trainer.rewards.verifier import Verifier
from trainer.rollout import sample
from trainer.tasks.split import stable_hash
from trainer.two_temperatures import TwoTemperatures

FILE = "temperatures.json"


@dataclass(frozen=True)
class Temperatures(Evaluation):
    """Which temperatures; the others of the paper's figure are the default."""

    low: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0)
    """Of tokens up to the threshold, with 1 for those above it."""
    high: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
    """Of tokens above the threshold, with 1 for the others."""
    threshold: float = 0.0
    """Nats; 0: that of the top `fraction` of the entropies at temperature 1, measured first."""
    fraction: float = 0.2
    """Share of the tokens above a threshold that is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}")
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
    "high"}, a 95% interval over problems, "length" and "truncated". Points that it has with the
    same settings are not sampled again. Returns its path.
    """
    with join(settings.device) as ranks:
        settings = replace(
            resolved(settings, ranks), out=settings.out or out_folder(settings.model)
        )
        policy = load(settings, ranks)
        asked = problems_of(settings, policy)
        settings = with_limit(settings, policy, asked)
        found = _found(settings)
        if found is None:
            found = {
                "settings": _plain(settings),
                "made": provenance(str(ranks.device)),
                "threshold": settings.threshold or _threshold(settings, policy, asked, ranks),
                "points": [],
            }
            _write(settings, found)
        for point in _points(settings, policy, asked, ranks, found):
            found["points"].append(point)
            _write(settings, found)
    _show(found)
    print(f"results: {Path(settings.out) / FILE}")
    return Path(settings.out) / FILE


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
    """What must not change between calls: without what is swept and how it is portioned."""
    free = ("low", "high", "out", "batch_size", "device", "workers")
    plain = {name: value for name, value in asdict(settings).items() if name not in free}
    return json.loads(json.dumps(plain))


def _found(settings: Temperatures) -> dict[str, Any] | None:
    """What an earlier call has written; None where there was none.

    Raises ValueError where it was made with other settings.
    """
    path = Path(settings.out) / FILE
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    now, before = _plain(settings), found["settings"]
    names = [name for name in now if now[name] != before.get(name)]
    if names:
        raise ValueError(
            f"{path} was made with other settings ({', '.join(names)}); choose another --out, or "
            "delete it"
        )
    return found


def _threshold(settings: Temperatures, policy: Policy, asked: Asked, ranks: Ranks) -> float:
    threshold = ek.StreamingThreshold(settings.fraction)
    for scored in scored_responses(settings, policy, asked, ranks):
        threshold.update(scored.entropy_BL[scored.rollouts.mask_BL])
    return float(threshold.value())


def _points(
    settings: Temperatures, policy: Policy, asked: Asked, ranks: Ranks, found: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Those that `found` lacks."""
    have = {(point["low"], point["high"]) for point in found["points"]}
    waiting = [pair for pair in settings.pairs() if pair not in have]
    if not waiting:
        return
    first = TwoTemperatures(found["threshold"], *waiting[0])
    engine = make_engine(engine_config(settings), policy, two_temperatures=first)
    engine.update_weights(policy.weights())
    with closing(engine), progress("temperatures", len(waiting), columns={}) as bar:
        for done, (low, high) in enumerate(waiting, start=1):
            engine.two_temperatures = TwoTemperatures(found["threshold"], low, high)
            yield {"low": low, "high": high, **_accuracy(settings, engine, policy, asked, ranks)}
            bar.update(done, {})


def _accuracy(
    settings: Temperatures, engine: Engine, policy: Policy, asked: Asked, ranks: Ranks
) -> dict[str, Any]:
    shares, lengths, truncated = [], [], []
    for name, (task, problems) in asked.items():
        verifier = Verifier(task, engine_config(settings).reward)
        verifier.start()
        with closing(verifier):
            size = max(settings.batch_size // settings.samples, 1)
            for first in range(0, len(problems), size):
                rollouts = sample(
                    engine,
                    policy,
                    verifier,
                    problems[first : first + size],
                    group_size=settings.samples,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=1.0,
                    seed=stable_hash(f"{settings.seed}/{name}"),
                    first=first,
                    ranks=ranks,
                )
                right_B = (rollouts.reward_B >= 1).float()
                shares += right_B.view(-1, settings.samples).mean(1).tolist()
                lengths += rollouts.mask_BL.sum(1).tolist()
                truncated += rollouts.truncated_B.tolist()
    return {
        "accuracy": estimate(shares, settings.samples)._asdict(),
        "length": sum(lengths) / len(lengths),
        "truncated": sum(truncated) / len(truncated),
    }


def _write(settings: Temperatures, found: dict[str, Any]) -> None:
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / FILE, json.dumps(found, indent=1) + "\n")
    if found["points"]:
        replace_text(folder / "temperatures.svg", draw(found, FILE))


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"two temperatures, threshold {found['threshold']:.3f} nats")
    for title in ("T_low", "T_high", "accuracy", "95% interval", "length", "truncated"):
        table.add_column(title, justify="right")
    for point in found["points"]:
        accuracy = point["accuracy"]
        table.add_row(
            f"{point['low']:g}",
            f"{point['high']:g}",
            f"{accuracy['value']:.1%}",
            f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
            f"{point['length']:.1f}",
            f"{point['truncated']:.1%}",
        )
    Console().print(table)
