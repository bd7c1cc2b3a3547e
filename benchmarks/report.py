"""Turns benchmarks/results/*.json into the tables and the plot that people read.

python -m benchmarks.report          rewrites README.md between its markers, the full tables of
                                     benchmarks/results/README.md and docs/benchmarks.svg
python -m benchmarks.report --check  fails where they are not what the result files say

A ratio is taken within a round, against eager's time in the same round; p50 and p20-p80 are over
the rounds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.plot import plot

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
FIGURE = (
    "![CPU time of a step against eager, by fraction of tokens](docs/benchmarks.svg)\n\n"
    "Every contestant, with seconds and errors: [benchmarks/results](benchmarks/results/README.md)."
)
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
BYTES = {"bfloat16": 2, "float32": 4}

Run = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, text in render(ROOT).items():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if check and stale:
        print(f"not what the result files say: {', '.join(stale)}; run python -m benchmarks.report")
    return int(check and bool(stale))


def render(root: Path) -> dict[Path, str]:
    """The text of every file that this script writes."""
    shapes = _by_shape(read(root / "benchmarks" / "results"))
    small = [_section(runs, _compact) for runs in shapes]
    full = [_section(runs, _full) for runs in shapes]
    readme = root / "README.md"
    return {
        readme: between_markers(readme.read_text(), "\n\n".join([*small, FIGURE])),
        root / "benchmarks" / "results" / "README.md": _full_page(full),
        root / "docs" / "benchmarks.svg": plot([_series(run) for run in shapes[0]]),
    }


def read(folder: Path) -> list[Run]:
    """The result files; a contestant that was refused has a reason and no times."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("linear_logprob*.json"))]
    if not runs:
        raise SystemExit(f"no result files in {folder}; make bench writes them")
    return runs


def between_markers(text: str, block: str) -> str:
    """`text` with `block` between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md needs one line {BEGIN} and, after it, one line {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def quantile(samples: list[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratios(run: Run, entry: Run, clock: str = "wall_s") -> list[float]:
    """Of each round: this contestant's time over the first one's."""
    return [x / y for x, y in zip(entry[clock], run["contestants"][0][clock], strict=True)]


def _by_shape(runs: list[Run]) -> list[list[Run]]:
    """Runs of one shape together, bf16 first; the largest shape first."""
    found: dict[tuple[int, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: list(DTYPES).index(run["dtype"])):
        found.setdefault(tuple(run["shape"].values()), []).append(run)
    return [found[shape] for shape in sorted(found, key=lambda shape: shape[-1], reverse=True)]


def _section(runs: list[Run], table: Any) -> str:
    shape = runs[0]["shape"]
    head = (
        f"**{shape['tokens']:,} tokens, hidden size {shape['hidden']:,}, "
        f"vocabulary {shape['vocabulary']:,}**"
    )
    return "\n\n".join([head, table(runs), "\n".join(_about(run) for run in runs)])


def _about(run: Run) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    eager, shape = quantile(run["contestants"][0]["wall_s"], 0.5), run["shape"]
    rows = shape["tokens"] + shape["vocabulary"]
    gradients = rows * shape["hidden"] * BYTES[run["dtype"]]
    return (
        f"<sub>{DTYPES[run['dtype']]}: {run['machine']}, {run['threads']} threads; {versions}; "
        f"commit {run['commit']}; {run['date']}; {run['rounds']} rounds; "
        f"eager takes {eager:.1f} s; the gradients alone are {gradients / 1e6:,.0f} MB.</sub><br>"
    )


def _compact(runs: list[Run]) -> str:
    """A row a contestant: units, and for each dtype times and memory. One torch row is enough."""
    names = [entry["name"] for entry in runs[0]["contestants"]]
    if any(name.startswith("cpu-") for name in names):
        names = [n for n in names if not n.startswith("torch-") or n == "torch-0.2"]
    columns = [f"{DTYPES[run['dtype']]} {what}" for run in runs for what in ("wall", "CPU", "MB")]
    rows = []
    for name in names:
        entries = [next((e for e in r["contestants"] if e["name"] == name), {}) for r in runs]
        cells = [entries[0]["label"], _units(entries)]
        for run, entry in zip(runs, entries, strict=True):
            cells += [_time(run, entry, "wall_s"), _time(run, entry, "cpu_s"), _megabytes(entry)]
        rows.append(cells)
    return _table(["time against eager: p50 (p20-p80)", "units", *columns], rows)


def _full(runs: list[Run]) -> str:
    """A table a dtype, with seconds, CPU time and errors."""
    columns = ["", "wall s", "CPU s", "wall / eager", "CPU / eager", "MB", "flops", "units"]
    parts = []
    for run in runs:
        rows = []
        for entry in run["contestants"]:
            cells = [entry["label"]]
            if "refused" in entry:
                rows.append([*cells, f"refused: {entry['refused']}", *[""] * 7])
                continue
            cells += [_spread(entry[clock], 2) for clock in ("wall_s", "cpu_s")]
            cells += [_spread(ratios(run, entry, clock), 3) for clock in ("wall_s", "cpu_s")]
            cells += [_megabytes(entry), f"{entry['flops']:.3g}", f"{entry['units']:.2f}"]
            rows.append([*cells, f"{entry['error']:.1e}"])
        parts.append(f"{DTYPES[run['dtype']]}\n\n{_table([*columns, 'error'], rows)}")
    return "\n\n".join(parts)


def _full_page(sections: list[str]) -> str:
    head = (
        "# All results\n\n"
        "Written by `python -m benchmarks.report` from the files beside it. Times are p50 "
        "(p20-p80) over rounds in which all contestants alternate; MB is the peak of resident "
        "memory above the inputs, gradients included, in a fresh process; a unit is one product "
        "of T x D x V; error is the largest of any result against fp64, relative to its norm."
    )
    return "\n\n".join([head, *sections]) + "\n"


def _series(run: Run) -> dict[str, Any]:
    """What the plot shows of one run: CPU time, the steadier clock, against eager by fraction."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for entry in run["contestants"]:
        if "wall_s" not in entry:
            continue
        low, middle, high = (quantile(ratios(run, entry, "cpu_s"), q) for q in (0.2, 0.5, 0.8))
        impl, _, rest = entry["name"].partition("-")
        if rest.replace(".", "").isdigit():
            lines.setdefault(impl, []).append((float(rest), low, middle, high))
        elif entry["name"] == "floor":
            # Measured where 1 + 3 x 0.2 products are; all products cost the same.
            for fraction in (0.0, 1.0):
                at = middle / entry["units"] * (1 + 3 * fraction)
                lines.setdefault("floor", []).append((fraction, at, at, at))
    return {"title": DTYPES[run["dtype"]], "shape": run["shape"], "lines": lines}


def _units(entries: list[Run]) -> str:
    return next((f"{entry['units']:.2f}" for entry in entries if "units" in entry), "")


def _time(run: Run, entry: Run, clock: str) -> str:
    if clock not in entry:
        return "refused" if "refused" in entry else ""
    return _spread(ratios(run, entry, clock), 2)


def _spread(samples: list[float], digits: int) -> str:
    low, middle, high = (f"{quantile(samples, q):.{digits}f}" for q in (0.2, 0.5, 0.8))
    return middle if low == high else f"{middle} ({low}-{high})"


def _megabytes(entry: Run) -> str:
    peak = entry.get("peak_bytes")
    return "" if peak is None else f"{peak / 1e6:,.0f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
