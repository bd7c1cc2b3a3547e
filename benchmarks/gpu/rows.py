"""The result rows: JSON lines, each on the disk before the next measurement starts.

A row belongs to the GPU, versions and sources it was measured with. Rows of others stay in the
file and count as not there. Several processes may append to one file.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Rows that differ in these belong to another run.
SAME = ("gpu", "driver", "versions", "source", "quick")
# What makes a row another one: everything else is its result.
IDENTITY = ("stage", "name", "tokens", "hidden", "vocabulary", "dtype", "alternated")
# After these the process has lost its GPU.
FATAL = ("illegal memory access", "unspecified launch failure", "device-side assert")
# Before the line that names what is measured next, so that a killed process has said it.
STARTED = "started "


class OutOfTimeError(BaseException):
    """A shard's time is over. Not an Exception, so that nothing takes it for a failed peer."""


class LostError(BaseException):
    """The process has lost its GPU; the row that did it is written."""


def _silent(line: str) -> None:
    pass


@dataclass
class Rows:
    """The measured rows, in a file. `log` gets a line before a measurement and one after it."""

    path: Path
    about: Row
    """Written into every row: GPU, versions, sources, commit, date."""
    log: Callable[[str], None] = _silent
    until: float = float("inf")
    """By time.monotonic(), when no more measurements start."""
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = [row for row in read(self.path)[0] if self._ours(row)]

    def _ours(self, row: Row) -> bool:
        return all(row["about"].get(key) == self.about.get(key) for key in SAME)

    def of(self, stage: str, **wanted: Any) -> list[Row]:
        """The rows of a stage that have these values; of one thing measured twice, the later."""
        found = {}
        for row in self.rows:
            if row["stage"] == stage and all(row.get(key) == x for key, x in wanted.items()):
                found[tuple(row.get(key) for key in IDENTITY[:-1])] = row
        return list(found.values())

    def has(self, stage: str, name: str, **shape: Any) -> bool:
        return bool(self.of(stage, name=name, **shape))

    def add(self, stage: str, name: str, **values: Any) -> Row:
        row = {"stage": stage, "name": name, **values, "about": self.about}
        self.rows.append(row)
        append(self.path, row)
        self.log(_line(row))
        return row

    def measure(self, stage: str, name: str, run: Callable[[], Row], **shape: Any) -> Row:
        """The row of that name and shape, measured unless it is there; more values are kept.

        What fails is a result too: its row has the reason. A GPU that is lost ends the process.
        """
        known = {key: x for key, x in shape.items() if key in IDENTITY}
        for row in self.of(stage, name=name, **known):
            return row
        self.start(stage, name, **shape)
        try:
            values = run()
        except Exception as error:
            row = self.add(stage, name, **shape, error=reason(error))
            if is_fatal(error):
                raise LostError(row["error"]) from error
            return row
        return self.add(stage, name, **(shape | values))

    def start(self, stage: str, name: str, **shape: Any) -> None:
        """Says what comes next: whoever ends this process writes its row."""
        if time.monotonic() > self.until:
            raise OutOfTimeError
        self.log(STARTED + json.dumps({"stage": stage, "name": name, **shape}))


def append(path: Path, row: Row) -> None:
    """Writes a row and waits for the disk. A line that was cut off before it stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # Let go of by the end of the process too, however it ends.
        fcntl.flock(file, fcntl.LOCK_EX)
        end = os.fstat(file.fileno()).st_size
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[list[Row], list[int]]:
    """The rows of a file, and the numbers of the lines that are none: cut off by a kill."""
    found, torn = [], []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            torn.append(number)
            continue
        whole = isinstance(row, dict) and isinstance(row.get("about"), dict)
        if whole and {"stage", "name"} <= row.keys():
            found.append(row)
        else:
            torn.append(number)
    return found, torn


def identity(row: Row) -> tuple[Any, ...]:
    """Equal for rows of the same measurement."""
    return tuple(row.get(key) for key in IDENTITY)


def is_fatal(error: Exception) -> bool:
    """Whether the process has lost its GPU."""
    return any(words in str(error) for words in FATAL)


def reason(error: Exception) -> str:
    """One line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _line(row: Row) -> str:
    shown = {k: v for k, v in row.items() if k not in ("about", "samples_ms", "stage", "name")}
    values = " ".join(f"{k}={_short(v)}" for k, v in shown.items())
    return f"{row['stage']}: {row['name']}: {values}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
