"""What a person sees while a run goes: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import rich.progress
from rich.console import Console
from torch import Tensor

# What is shown: label -> (metrics, added up; format).
Columns = Mapping[str, tuple[tuple[str, ...], str]]
RL: Columns = {
    "reward": (("reward/mean",), ".2f"),
    "threshold": (("entropy/threshold",), ".2f"),
    "kept": (("entropy/kept_fraction",), ".1%"),
    "clip": (("clip/low", "clip/high"), ".2%"),
    "tokens/s": (("tokens_per_second",), ",.0f"),
    "accuracy": (("eval/accuracy",), ".1%"),
}
WARM_START: Columns = {
    "loss": (("loss",), ".3f"),
    "tokens/s": (("tokens_per_second",), ",.0f"),
}

_BAR_WIDTH = 20  # Drawn where 80 columns remain for the numbers.
_PLAIN_LINES = 20  # About so many plain lines a run, ...
_PLAIN_SECONDS = 60.0  # ... and never a longer silence than this between steps.


def labelled(columns: Columns, metrics: Mapping[str, float | Tensor | None]) -> dict[str, str]:
    """Each of `columns` that has all of its metrics, by its label, as text."""
    shown = {}
    for label, (keys, form) in columns.items():
        values = [value for value in map(metrics.get, keys) if value is not None]
        if len(values) == len(keys):
            shown[label] = format(sum(map(float, values)), form)
    return shown


class Bar:
    """Where a loop stands. A column whose metrics a step lacks keeps what it last showed."""

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
        self._shown: dict[str, str] = {}
        self._began = self._printed = time.monotonic()
        if live is not None:
            self._task = live.add_task(description, total=total, completed=start, text=description)

    def update(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Show that `step` of the loop is done, with `metrics` of that step."""
        self._shown |= labelled(self._columns, metrics)
        # In the order of the columns, whichever metric came first.
        shown = [f"{label} {self._shown[label]}" for label in self._columns if label in self._shown]
        place = f"{self._description} {step}/{self._total}"
        text = "  ".join(filter(None, [place, self._left(step), *shown]))
        if self._live is not None:
            self._live.update(self._task, completed=step, text=text)
        elif self._plain and self._due(step):
            print(text, flush=True)

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
    """A `Bar` from `start` steps done to `total`; nothing is seen of it unless `shown`.

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
