"""Following a run from another terminal: its last numbers and their course."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.log import read_rows, read_run
from trainer.report.progress import RL, Columns, evaluated, labelled, told
from trainer.report.skips import Skips, advice, composition
from trainer.report.standing import LOCK, Standing, passed, standing

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


class View(NamedTuple):
    """The rows and the standing at one look."""

    rows: Sequence[Row]
    standing: Standing


def watch(folder: Path) -> None:
    """Show the run in `folder` until its last step: live on a terminal, else a line per step.

    Raises ValueError where `folder` is not the folder of a run, nor of one that starts.
    """
    if not (folder / LOCK).exists():
        read_run(folder)
    if not sys.stdout.isatty():
        _print_lines(folder)
        return
    with Live(console=Console(), auto_refresh=False) as live:
        for view in _follow(folder):
            live.update(_screen(folder, view), refresh=True)


def sparkline(values: Sequence[float | None]) -> str:
    """A block per value, from the smallest to the largest; a blank for a missing one."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    height = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if v is None else BLOCKS[round((v - low) * height)] for v in values)


def _follow(folder: Path) -> Iterator[View]:
    """The view now and at each later look, up to the last step."""
    metrics, seen, rows = folder / "metrics.jsonl", None, []
    while True:
        if metrics.exists():
            now = metrics.stat()
            if (now.st_ino, now.st_size, now.st_mtime_ns) != seen:
                seen, rows = (now.st_ino, now.st_size, now.st_mtime_ns), read_rows(metrics)
        # Read each time: a run that resumes may have more steps, and one that starts has none yet.
        there = (folder / "run.json").exists() or not (folder / LOCK).exists()
        steps = read_run(folder)["config"]["steps"] if there else 0
        view = View(rows, standing(folder, rows, steps))
        yield view
        if view.standing.word == "ended":
            return
        time.sleep(SECONDS)


def _print_lines(folder: Path) -> None:
    """Print the steps so far and each new one; a run that goes back to a checkpoint is followed."""
    printed, said = -1, ""
    for rows, now in _follow(folder):
        if rows and rows[-1]["step"] < printed:
            printed = rows[-1]["step"]
            print(f"back at {printed}/{now.steps}", flush=True)
        if rows and rows[-1]["step"] > printed:
            _print_rows(rows, printed, now.steps)
            printed = rows[-1]["step"]
        # Once, and again whenever it has been silent for twice as long.
        note = f"{now.word} {int(now.age / now.patience).bit_length() if now.stale else 0}"
        if note != said and now.word != "ended" and (now.word != "running" or now.stale):
            print(_state(now), flush=True)
        said = note


def _print_rows(rows: Sequence[Row], printed: int, steps: int) -> None:
    """Print the rows after `printed`, with the warnings that belong to them."""
    skips = Skips()
    for row in rows:
        warning = skips.add(row)
        if row["step"] > printed:
            print("  ".join([f"{row['step']}/{steps}", *told(COLUMNS, row, skips)]), flush=True)
            if row["step"] == steps and skips.headline():
                warning = skips.warning(row)
            if warning:
                print(warning, flush=True)


def _state(now: Standing) -> str:
    """The state of the run in words."""
    if now.word == "ended":
        return f"ended {passed(now.age)} ago"
    if now.word == "stopped":
        place = f"at step {now.step:,} of {now.steps:,}" if now.step else "before its first step"
        return f"stopped {place}, {passed(now.age)} ago; the same command resumes it"
    if now.word == "starting":
        return f"no step yet; it started {passed(now.age)} ago"
    slow = f"; steps take less than {passed(now.patience)}" if now.stale else ""
    return f"last step {passed(now.age)} ago{slow}"


def _screen(folder: Path, view: View) -> Group:
    """A line on where the run stands, and one per metric: its last value and recent course."""
    rows, now = view
    loud = "bold red" if now.stale or now.word == "stopped" else ""
    if not rows:
        return Group(Text(f"{folder.name}: {_state(now)}", style=loud))
    skips = Skips()
    for row in rows:
        skips.add(row)
    table = Table.grid(padding=(0, 2))
    last = rows[-1]
    names = {name: None for row in rows for name in evaluated(row)}
    columns = {**COLUMNS, **{name: ((f"eval/{name}.accuracy",), ".1%") for name in names}}
    for label, column in columns.items():
        having = [row for row in rows if labelled({label: column}, row)][-WIDTH:]
        if having:
            text = labelled({label: column}, having[-1])[label]
            values = [_sum(row, column[0]) for row in having]
            old = "" if having[-1] is last else f"at step {having[-1]['step']}"
            table.add_row(label, Text(text, justify="right"), sparkline(values), old)
    place = f"{folder.name}  step {now.step}/{now.steps}"
    head = "  ".join(filter(None, [place, _left(rows, now), _state(now)]))
    own = {key: value for key, value in last.items() if not evaluated([key])}
    lines = [Text(head, style=loud), *(Text(part, style="red") for part in told({}, own, skips))]
    if skips.headline():
        told_of = [skips.headline(), composition(last), *advice(last)]
        lines += [Text(text, style="bold red") for text in told_of if text]
    return Group(*lines, table)


def _sum(row: Row, keys: Sequence[str]) -> float | None:
    values = [row[key] for key in keys]
    return None if None in values else sum(values)


def _left(rows: Sequence[Row], now: Standing) -> str:
    """The time left, by the mean of the last steps, evaluations included."""
    last = [row for row in rows if row.get("time/step")][-WIDTH:]
    if not last or now.word != "running":
        return ""
    spent = sum(row["time/step"] + (row.get("time/evaluate") or 0.0) for row in last) / len(last)
    return f"{passed(spent * (now.steps - now.step))} left"
