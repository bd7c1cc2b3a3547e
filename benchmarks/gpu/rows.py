"""The result rows: JSON lines that a run appends to and a later run skips what they hold.

A row belongs to the GPU, versions and sources it was measured with. Rows of others stay in the
file and count as not there.
"""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

Row = dict[str, Any]

# Rows that differ in these belong to another run.
SAME = ("gpu", "driver", "versions", "source", "quick")
# After these the process has lost its GPU.
FATAL = ("illegal memory access", "unspecified launch failure", "device-side assert")


class LimitReached(BaseException):
    """The stage's time is over. Not an Exception, so that nothing takes it for a failed peer."""


@dataclass
class Rows:
    """The measured rows, in a file."""

    path: Path
    about: Row
    """Written into every row: GPU, versions, sources, commit, date."""
    log: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            self.rows = [row for row in map(json.loads, lines) if self._ours(row)]

    def _ours(self, row: Row) -> bool:
        return all(row["about"].get(key) == self.about.get(key) for key in SAME)

    def of(self, stage: str, **wanted: Any) -> list[Row]:
        """The rows of a stage that have these values; of two with one name the later."""
        found = {}
        for row in self.rows:
            if row["stage"] == stage and all(row.get(key) == x for key, x in wanted.items()):
                found[_identity(row)] = row
        return list(found.values())

    def has(self, stage: str, name: str, **shape: int) -> bool:
        return bool(self.of(stage, name=name, **shape))

    def add(self, stage: str, name: str, **values: Any) -> Row:
        row = {"stage": stage, "name": name, **values, "about": self.about}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.log(_line(row))
        return row

    def measure(self, stage: str, name: str, run: Callable[[], Row], **shape: Any) -> Row:
        """The row of that name and shape, measured unless it is there.

        What fails is a result too: its row has the reason. A GPU that is lost ends the process.
        """
        for row in self.of(stage, name=name, **shape):
            return row
        try:
            values = run()
        except Exception as error:
            row = self.add(stage, name, **shape, error=reason(error))
            if any(words in str(error) for words in FATAL):
                raise
            return row
        return self.add(stage, name, **shape, **values)


def reason(error: Exception) -> str:
    """One line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def limited(seconds: int, work: Callable[[], None]) -> bool:
    """Whether `work` ended by itself within `seconds`; what it had added by then is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitReached

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        work()
    except LimitReached:
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return True


def _identity(row: Row) -> tuple[Any, ...]:
    shape = tuple(row.get(key) for key in ("tokens", "hidden", "vocabulary", "dtype"))
    return row["stage"], row["name"], *shape


def _line(row: Row) -> str:
    shown = {k: v for k, v in row.items() if k not in ("about", "samples_ms", "stage", "name")}
    values = " ".join(f"{k}={_short(v)}" for k, v in shown.items())
    return f"{row['stage']}: {row['name']}: {values}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
