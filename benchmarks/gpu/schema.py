"""What a file of rows must say before it is taken into benchmarks/results/gpu/.

SCHEMA describes a row. `complaints` names, line by line, what came and what was wanted.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.rows import SAME, Row, identity
from benchmarks.tables import quantile
from entropy_kernels._bench.contestant import ROUNDED_LOGITS, ROUNDED_ONCE


class Kind(NamedTuple):
    """What a value must be, in words and as a question."""

    words: str
    holds: Callable[[Any], bool]


def _number(x: Any) -> bool:
    # Beyond any number is what json reads from NaN and Infinity.
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e18


def _is_date(x: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", x):
        return False
    try:
        datetime.date.fromisoformat(x)
    except ValueError:
        return False
    return True


TEXT = Kind("a text", lambda x: isinstance(x, str) and x.strip() != "")
POSITIVE = Kind("a number above 0", lambda x: _number(x) and x > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda x: _number(x) and x >= 0)
SIZE = Kind("a whole number above 0", lambda x: _number(x) and isinstance(x, int) and x > 0)
TRUE = Kind("true", lambda x: x is True)
FALSE = Kind("false: tiny shapes measure nothing", lambda x: x is False)
DATE = Kind("a date as 2026-01-31", lambda x: isinstance(x, str) and _is_date(x))
SAMPLES = Kind(
    "a list of numbers above 0",
    lambda x: isinstance(x, list) and len(x) > 0 and all(map(POSITIVE.holds, x)),
)
NAMES = Kind(
    "a list of texts", lambda x: isinstance(x, list) and len(x) > 0 and all(map(TEXT.holds, x))
)
VERSIONS = Kind(
    "an object with torch and triton",
    lambda x: isinstance(x, dict) and {"torch", "triton"} <= x.keys(),
)

ABOUT = {
    **dict.fromkeys(("gpu", "architecture", "driver", "source", "commit"), TEXT),
    "versions": VERSIONS,
    "date": DATE,
    "quick": FALSE,
}
# Values that a row may have, by name; a row of a stage has those of WANTED too.
SCHEMA = {
    **dict.fromkeys(("stage", "name", "label", "error", "refused", "left_out", "op"), TEXT),
    **dict.fromkeys(("tokens", "hidden", "vocabulary", "entropies"), SIZE),
    **dict.fromkeys(("p50_ms", "p20_ms", "p80_ms", "call_ms", "tflops", "gb_per_s"), POSITIVE),
    **dict.fromkeys(("seconds", "predicted_s", "units", "base_share"), POSITIVE),
    **dict.fromkeys(("error_of_norm", "peak_bytes"), NOT_NEGATIVE),
    "samples_ms": SAMPLES,
    "kernels": NAMES,
    "passed": TRUE,
}
SHAPE = ("tokens", "hidden", "vocabulary")
TIMES = ("p50_ms", "p20_ms", "p80_ms", "samples_ms")
# Where nothing failed.
WANTED = {
    "environment": (),
    "floors": (*SHAPE, *TIMES),
    "correctness": ("kernels", "passed"),
    "steps": (*SHAPE, *TIMES, "label", "error_of_norm", "peak_bytes"),
    "threshold": (*TIMES, "entropies"),
    "graphs": (*SHAPE, *TIMES, "call_ms"),
    "sweep": (*SHAPE, *TIMES, "op", "tile", "error_of_norm"),
    "profile": (),
    "run": ("seconds", "predicted_s"),
}
FAILED = ("error", "refused", "left_out")
# What is further from the truth was never timed.
MOST_ERROR = {"steps": ROUNDED_LOGITS, "sweep": ROUNDED_ONCE}


def complaints(path: Path) -> list[str]:
    """What is wrong with a file; empty where nothing is."""
    if not path.exists():
        return ["no such file"]
    found: list[str] = []
    seen: dict[tuple[Any, ...], int] = {}
    first: Row = {}
    timed = passed = 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            found.append(f"line {number}: got {_short(line.decode(errors='replace'))}; wanted JSON")
            continue
        wrong = list(_of_row(row))
        found += [f"line {number}: {complaint}" for complaint in wrong]
        if wrong:
            continue
        timed += row["stage"] in ("floors", "steps") and "p50_ms" in row
        passed += row["stage"] == "correctness" and "passed" in row
        first = first or row["about"]
        for key in SAME:
            if row["about"].get(key) != first.get(key):
                got, wanted = _short(row["about"].get(key)), _short(first.get(key))
                found.append(f"line {number}: about.{key}: got {got}; wanted {wanted}, as before")
        before = seen.setdefault(identity(row), number)
        if before != number:
            found.append(f"line {number}: got {row['name']!r} again; wanted it once, line {before}")
    if not timed:
        found.append("got no timed row; wanted times of floors or steps")
    elif not passed and not found:
        found.append("got no case of correctness that passed; wanted those of what was timed")
    return found


def _of_row(row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"got {_short(row)}; wanted an object"
        return
    for key in ("stage", "name", "about"):
        if key not in row:
            yield f"{key}: got nothing; wanted it"
            return
    if not TEXT.holds(row["name"]):
        yield f"name: got {_short(row['name'])}; wanted {TEXT.words}"
        return
    if not TEXT.holds(row["stage"]) or row["stage"] not in WANTED:
        yield f"stage: got {_short(row['stage'])}; wanted one of {', '.join(WANTED)}"
        return
    if not isinstance(row["about"], dict):
        yield f"about: got {_short(row['about'])}; wanted an object"
        return
    yield from _of_values(row["about"], ABOUT, ABOUT, "about.")
    contest = row["stage"] in ("steps", "sweep") and row["name"].startswith("alternation")
    complete = contest or any(key in row for key in FAILED)
    yield from _of_values(row, SCHEMA, () if complete else WANTED[row["stage"]], "")
    error, most = row.get("error_of_norm"), MOST_ERROR.get(row["stage"])
    if most is not None and NOT_NEGATIVE.holds(error) and error > most:
        yield f"error_of_norm: got {error:g}; wanted {most} at most"
    if all(SCHEMA[key].holds(row.get(key)) for key in TIMES):
        for q, key in zip((50, 20, 80), TIMES, strict=False):
            wanted = quantile(row["samples_ms"], q / 100)
            if abs(row[key] - wanted) > 1e-3 * wanted + 1e-4:
                yield f"{key}: got {row[key]:.6g}; wanted {wanted:.6g}, by its samples"


def _of_values(row: Row, schema: dict[str, Kind], wanted: Any, prefix: str) -> Iterator[str]:
    for key in wanted:
        if key not in row:
            words = schema[key].words if key in schema else "it"
            yield f"{prefix}{key}: got nothing; wanted {words}"
    for key, kind in schema.items():
        if key in row and not kind.holds(row[key]):
            yield f"{prefix}{key}: got {_short(row[key])}; wanted {kind.words}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and len(value) > 60 else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
