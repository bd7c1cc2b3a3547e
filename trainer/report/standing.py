"""Where a run stands, by its folder: starting, running, stopped or ended."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

LOCK = ".lock"
"""The file of trainer.launch.lock, which tells host and process of a folder's owner."""
LAST = 20  # Steps whose mean time tells how long one takes.
PATIENCE = 60.0  # Seconds without a step that are no reason to worry, ...
STEPS = 5  # ... nor is the time of so many steps.

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """The standing of a run at a moment."""

    word: Literal["starting", "running", "stopped", "ended"]
    step: int
    steps: int
    age: float
    """Seconds since its last row, or since its start where it has none."""
    patience: float
    """Seconds for which a running one may be silent."""

    @property
    def stale(self) -> bool:
        """Whether it runs without a word for so long that it may hang."""
        return self.word in ("starting", "running") and self.age > self.patience

    def sentence(self, now: float | None = None) -> str:
        """What the page says at its top."""
        now = time.time() if now is None else now
        place = f"step {self.step:,} of {self.steps:,}"
        then = _utc(now - self.age)
        if self.word == "ended":
            return f"Ended: {place}, at {then}."
        if self.word == "stopped":
            return f"Stopped at {place}, at {then}; the same command resumes it."
        silent = f"; no step for {passed(self.age)}" if self.stale else ""
        return f"{self.word.capitalize()}: {place}, as of {_utc(now)}{silent}."


def standing(
    folder: Path, rows: Sequence[Row], steps: int, running: bool | None = None
) -> Standing:
    """Where the run in `folder` stands, with `rows` in its metrics.jsonl.

    `running` is whether a process works on it; None: as far as the folder tells.
    """
    step = rows[-1]["step"] if rows else 0
    age = _age(folder, bool(rows))
    patience = _patience(rows)
    if running is None:
        running = in_use(folder)
    if running is None:  # its owner is elsewhere, or the file system has no locks
        running = age <= patience
    word: Literal["starting", "running", "stopped", "ended"] = "stopped"
    if rows and step >= steps:
        word = "ended"
    elif running:
        word = "running" if rows else "starting"
    return Standing(word, step, steps, age, patience)


def in_use(folder: Path) -> bool | None:
    """Whether a process works in `folder`, by its lock; None where that cannot be told from here.

    The lock is not tried: a run that starts meanwhile would find it taken.
    """
    try:
        owner = json.loads((folder / LOCK).read_text("utf-8"))
        if owner["host"] != socket.gethostname():
            return None
        os.kill(owner["pid"], 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:  # the process of somebody else
        return True
    except (ValueError, TypeError, KeyError):
        return None
    return True


def passed(seconds: float) -> str:
    """A length of time, to the second."""
    return str(timedelta(seconds=round(seconds)))


def _age(folder: Path, rows: bool) -> float:
    """Since metrics.jsonl was written; before that, since the run took its folder."""
    for name in ("metrics.jsonl",) if rows else (LOCK, "run.json"):
        if (folder / name).exists():
            return max(0.0, time.time() - (folder / name).stat().st_mtime)
    return 0.0


def _patience(rows: Sequence[Row]) -> float:
    last = [row for row in rows[-LAST:] if row.get("time/step")]
    if not last:
        return 10 * PATIENCE  # the model, its warm start and a first evaluation
    spent = sum(row["time/step"] + (row.get("time/evaluate") or 0.0) for row in last)
    return max(
        PATIENCE,
        STEPS * spent / len(last),
        2 * max(row.get("time/evaluate") or 0.0 for row in rows),
    )


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
