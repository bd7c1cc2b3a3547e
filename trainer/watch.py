"""Following a run from another terminal: its last numbers, and how they came to be."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.log import read_rows, read_run
from trainer.progress import RL, Columns, labelled

COLUMNS: Columns = {
    **RL,
    "entropy": (("entropy/mean",), ".3f"),
    "length": (("response/length",), ",.0f"),
    "truncated": (("response/truncated",), ".1%"),
    "gradient": (("grad_norm",), ".3f"),
}
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # Steps that a sparkline shows.
SECONDS = 0.5  # Between two looks at the file.

Row = Mapping[str, Any]


def watch(folder: Path) -> None:
    """Show the run in `folder` until its last step: live on a terminal, else a line a step.

    Raises ValueError where `folder` is not the folder of a run.
    """
    read_run(folder)
    if not sys.stdout.isatty():
        _print_lines(folder)
        return
    with Live(console=Console(), auto_refresh=False) as live:
        for rows, steps in _follow(folder):
            live.update(_screen(folder, rows, steps), refresh=True)


def sparkline(values: Sequence[float | None]) -> str:
    """A block a value, from the smallest to the largest; a blank where there is none."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    height = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if v is None else BLOCKS[round((v - low) * height)] for v in values)


def _follow(folder: Path) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The rows so far and the number of steps, now and whenever one looks, up to the last step."""
    metrics, seen, rows = folder / "metrics.jsonl", None, []
    while True:
        if metrics.exists():
            now = metrics.stat()
            if (now.st_ino, now.st_size, now.st_mtime_ns) != seen:
                seen, rows = (now.st_ino, now.st_size, now.st_mtime_ns), read_rows(metrics)
        # Read each time: a run that resumes may have more steps.
        steps = read_run(folder)["config"]["steps"]
        yield rows, steps
        if rows and rows[-1]["step"] >= steps:
            return
        time.sleep(SECONDS)


def _print_lines(folder: Path) -> None:
    """What is there, then each step as it comes; a run that goes back is followed back."""
    printed = -1
    for rows, steps in _follow(folder):
        if rows and rows[-1]["step"] < printed:
            printed = rows[-1]["step"]
            print(f"back at {printed}/{steps}", flush=True)
        for row in rows:
            if row["step"] > printed:
                shown = [f"{label} {text}" for label, text in labelled(COLUMNS, row).items()]
                print("  ".join([f"{row['step']}/{steps}", *shown]), flush=True)
                printed = row["step"]


def _screen(folder: Path, rows: Sequence[Row], steps: int) -> Group:
    """A line of where it stands, and a line a metric: its last value and the last steps' course."""
    if not rows:
        return Group(Text(f"{folder.name}: no step yet"))
    table = Table.grid(padding=(0, 2))
    for label, (keys, _) in COLUMNS.items():
        having = [row for row in rows if label in labelled({label: COLUMNS[label]}, row)][-WIDTH:]
        if having:
            values = [sum(row[key] for key in keys) for row in having]
            last = labelled(COLUMNS, having[-1])[label]
            table.add_row(label, Text(last, justify="right"), sparkline(values))
    parts = [f"{folder.name}  step {rows[-1]['step']}/{steps}", _left(rows, steps), _age(folder)]
    return Group(Text("  ".join(filter(None, parts))), table)


def _left(rows: Sequence[Row], steps: int) -> str:
    """By the mean time of the last steps, evaluations included."""
    last = [row for row in rows if row.get("time/step")][-WIDTH:]
    if not last:
        return ""
    spent = sum(row["time/step"] + row.get("time/evaluate", 0.0) for row in last) / len(last)
    return f"{timedelta(seconds=round(spent * (steps - rows[-1]['step'])))} left"


def _age(folder: Path) -> str:
    seconds = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    return f"last step {timedelta(seconds=round(seconds))} ago"
