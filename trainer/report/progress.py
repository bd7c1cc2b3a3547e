"""Progress while a run goes: a live bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import rich.progress
from rich.console import Console
from torch import Tensor

from trainer.report.skips import Skips, reason

# What is shown: label -> (metrics that are summed, format).
Columns = Mapping[str, tuple[tuple[str, ...], str]]
# Metrics of a step; None stands for a value that was not finite.
Row = Mapping[str, float | Tensor | None]
RL: Columns = {
    "reward": (("reward/mean",), ".2f"),
    "threshold": (("entropy/threshold",), ".2f"),
    "selected": (("entropy/selected_fraction",), ".1%"),
    "clip": (("clip/low", "clip/high"), ".2%"),
    "tokens/s": (("tokens_per_second",), ",.0f"),
    "accuracy": (("eval/accuracy",), ".1%"),
}
WARM_START: Columns = {
    "loss": (("loss",), ".3f"),
    "tokens/s": (("tokens_per_second",), ",.0f"),
}

_BAR_WIDTH = 20  # Drawn where 80 columns remain for the numbers.
_PLAIN_LINES = 20  # About so many plain lines per run, ...
_PLAIN_SECONDS = 60.0  # ... and never a longer silence than this between steps.


def labelled(columns: Columns, metrics: Row) -> dict[str, str]:
    """Each of `columns` that has all of its metrics, by its label, as text."""
    shown = {}
    for label, (keys, form) in columns.items():
        if all(key in metrics for key in keys):
            values = [_finite(metrics[key]) for key in keys]
            known = [value for value in values if value is not None]
            shown[label] = format(sum(known), form) if len(known) == len(keys) else "not finite"
    return shown


def evaluated(metrics: Iterable[str]) -> Columns:
    """A column for each named set of an evaluation, "eval/NAME.accuracy"."""
    return {
        key.removeprefix("eval/").removesuffix(".accuracy"): ((key,), ".1%")
        for key in metrics
        if key.startswith("eval/") and key.endswith(".accuracy")
    }


def told(columns: Columns, metrics: Row, skips: Skips) -> list[str]:
    """The parts of the line on a step that `skips` has counted."""
    count = f"{skips.skipped:,} of {skips.steps:,}"
    why = reason(metrics)
    parts = [f"skipped: {why} ({count})"] if why else []
    if skips.skipped and not why:
        parts.append(f"skipped {count}")
    columns = {**columns, **evaluated(metrics)}
    parts += [f"{label} {text}" for label, text in labelled(columns, metrics).items()]
    of = metrics.get("response/count")
    for name, label in (("timeouts", "verifier time-outs"), ("crashes", "verifier crashes")):
        if failed := metrics.get(f"reward/{name}"):
            parts.append(f"{label} {float(failed):.0f}" + (f" of {float(of):.0f}" if of else ""))
        evaluating = sum(_finite(metrics[key]) or 0.0 for key in metrics if _counts(key, name))
        parts += [f"{label} in evaluation {evaluating:.0f}"] if evaluating else []
    if lost := sum(_finite(value) is None for value in metrics.values()):
        parts.append(f"{lost} value{'s' if lost > 1 else ''} not finite")
    return parts


def _counts(key: str, failure: str) -> bool:
    """Whether the metric `key` counts this failure of the verifier in the evaluation of a set."""
    return key == f"eval/{failure}" or (key.startswith("eval/") and key.endswith(f".{failure}"))


def _finite(value: float | Tensor | None) -> float | None:
    """The value; None if it is not finite, as in metrics.jsonl."""
    return None if value is None or not math.isfinite(value) else float(value)


class Bar:
    """A loop's progress. Between evaluations it shows the last accuracy, with its step."""

    def __init__(
        self,
        description: str,
        total: int,
        start: int,
        columns: Columns,
        live: rich.progress.Progress | None,
        shown: bool = True,
    ):
        self._description, self._total, self._start = description, total, start
        self._columns, self._live, self._plain = columns, live, shown and live is None
        self._accuracy, self._skips = "", Skips()
        self._began = self._printed = time.monotonic()
        if live is not None:
            self._task = live.add_task(description, total=total, completed=start, text=description)

    def recall(self, rows: Sequence[Row]) -> None:
        """Count the steps of `rows`, those of earlier starts; a row of step 0 alone is shown."""
        for row in rows:
            self._skips.add(row)
            if own := labelled(self._columns, row).get("accuracy"):
                self._accuracy = f"accuracy {own} at step {row['step']}"
        if len(rows) == 1 and rows[0]["step"] == 0:
            self.update(0, rows[0])

    def update(self, step: int, metrics: Row) -> None:
        """Show that `step` of the loop is done, with `metrics` of that step."""
        warning = self._skips.add({"step": step, **metrics})
        if step == self._total and self._skips.headline():
            warning = self._skips.warning(metrics)
        parts = told(self._columns, metrics, self._skips)
        if own := labelled(self._columns, metrics).get("accuracy"):
            self._accuracy = f"accuracy {own} at step {step}"
        elif self._accuracy:
            parts.append(self._accuracy)
        place = f"{self._description} {step}/{self._total}"
        text = "  ".join(filter(None, [place, self._left(step), *parts]))
        if self._live is not None:
            self._live.update(self._task, completed=step, text=text)
            if warning:
                self._live.console.print(warning, style="bold red", markup=False, highlight=False)
        elif self._plain:
            if self._due(step):
                print(text, flush=True)
            if warning:
                print(warning, flush=True)

    def _left(self, step: int) -> str:
        """Time left, by the mean of the steps since the start (evaluations included)."""
        done = step - self._start
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        return f"{timedelta(seconds=round(seconds))} left"

    def _due(self, step: int) -> bool:
        every = max(1, (self._total - self._start) // _PLAIN_LINES)
        now = time.monotonic()
        ends = step in (self._start, self._start + 1, self._total)
        if ends or step % every == 0 or now - self._printed > _PLAIN_SECONDS:
            self._printed = now
            return True
        return False


@contextmanager
def progress(
    description: str, total: int, start: int = 0, columns: Columns = RL, shown: bool = True
) -> Iterator[Bar]:
    """A `Bar` from `start` steps done to `total`; it is invisible unless `shown`.

    On a terminal it is drawn live on stderr, and what the loop prints appears above it. Where
    stdout or stderr is a file or a pipe, lines without control characters go to stdout.
    """
    console = Console(stderr=True)
    if not shown or not (sys.stdout.isatty() and sys.stderr.isatty()) or console.is_dumb_terminal:
        yield Bar(description, total, start, columns, None, shown)
        return
    # One column of text: a narrow terminal cuts its end and not the middle of each part.
    parts: list[rich.progress.ProgressColumn] = [
        rich.progress.TextColumn("{task.fields[text]}", markup=False)
    ]
    if console.width >= _BAR_WIDTH + 80:
        parts.insert(0, rich.progress.BarColumn(bar_width=_BAR_WIDTH))
    with rich.progress.Progress(*parts, console=console) as live:
        yield Bar(description, total, start, columns, live)
