"""Helpers for the tables of all benchmarks: quantiles, ratios within rounds, and Markdown."""

from collections.abc import Iterable
from typing import Any

from entropy_kernels._bench.machine import Processor

DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
BYTES = {"bfloat16": 2, "float32": 4}

Run = dict[str, Any]


def quantile(samples: Iterable[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratios(entry: Run, other: Run, clock: str = "wall_s") -> list[float]:
    """This contestant's time over the other's, for each round."""
    return [x / y for x, y in zip(entry[clock], other[clock], strict=True)]


def median_ratio(entry: Run, other: Run, clock: str = "wall_s") -> float | None:
    """The p50 over the rounds; None where one of the two was not timed."""
    if clock not in entry or clock not in other:
        return None
    return quantile(ratios(entry, other, clock), 0.5)


def named(run: Run, name: str) -> Run:
    """A run's entry of this name, or an empty one."""
    return next((entry for entry in run["contestants"] if entry["name"] == name), {})


def spread(samples: list[float], digits: int) -> str:
    low, middle, high = (f"{quantile(samples, q):.{digits}f}" for q in (0.2, 0.5, 0.8))
    return middle if low == high else f"{middle} ({low}-{high})"


def cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def megabytes(entry: Run, digits: int = 0) -> str:
    peak = entry.get("peak_bytes")
    return "" if peak is None else f"{peak / 1e6:,.{digits}f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def about(run: Run, more: str = "") -> str:
    """Machine, versions, commit, date, in small print."""
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    threads = f"{run['threads']} threads" if run["threads"] > 1 else "1 thread"
    instruction = f", {run['instruction']}" if run.get("instruction") else ""
    libraries = f" with {run['blas']}" if run.get("blas") else ""
    if run["dtype"] == "float32" and "fp32_products" in run:
        libraries += f", fp32 products of {run['fp32_products']} precision"
    rounds = f"{run['rounds']} rounds" if run["rounds"] > 1 else "1 round"
    return (
        f"<sub>{DTYPES[run['dtype']]}: {run['machine']}, {threads}{instruction}; "
        f"{versions}{libraries}; commit {run['commit']}; {run['date']}; {rounds}{more}.</sub><br>"
    )


def processor_of(run: Run) -> Processor:
    """The processor of the run; older files have only its name, with family and model."""
    if "processor" not in run:
        return Processor.parse(run["machine"])
    return Processor(*(run["processor"][key] for key in ("name", "vendor", "family", "model")))


def by_make(runs: dict[str, list[Run]]) -> list[dict[str, list[Run]]]:
    """The runs of each make of processor, by op; the make that was measured last comes first."""
    found: dict[str, dict[str, list[Run]]] = {}
    for op, of_op in runs.items():
        for run in of_op:
            found.setdefault(processor_of(run).slug, {}).setdefault(op, []).append(run)
    last = {
        make: max(r["date"] for of_op in x.values() for r in of_op) for make, x in found.items()
    }
    return [found[make] for make in sorted(found, key=last.__getitem__, reverse=True)]


def make_heading(runs: dict[str, list[Run]]) -> str:
    """Make and name of the processor, our instruction set for each dtype, torch's libraries."""
    every = [run for of_op in runs.values() for run in of_op]
    processor = processor_of(every[0])
    sets = {DTYPES[run["dtype"]]: run["instruction"] for run in every if run.get("instruction")}
    instructions = ", ".join(f"{name} for {dtype}" for dtype, name in sorted(sets.items()))
    libraries = sorted({run["blas"] for run in every if run.get("blas")})
    return (
        f"**On {processor.make}**, as {processor}. Instruction set: "
        f"{instructions or 'not recorded'}. Torch's libraries: "
        f"{' or '.join(libraries) or 'not recorded'}."
    )


def by_shape(runs: list[Run]) -> list[list[Run]]:
    """Runs of one shape together, bf16 first; the largest shape first."""
    found: dict[tuple[int, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: list(DTYPES).index(run["dtype"])):
        found.setdefault(tuple(run["shape"].values()), []).append(run)
    return [found[shape] for shape in sorted(found, key=lambda shape: shape[-1], reverse=True)]


def seconds_table(run: Run) -> str:
    """One row per contestant: seconds and ratios to the first, by both clocks, memory, error."""
    first = run["contestants"][0]
    against = f"/ {first['name']}"
    columns = ["", "wall s", "CPU s", f"wall {against}", f"CPU {against}", "MB", "error"]
    rows = []
    for entry in run["contestants"]:
        if "refused" in entry:
            rows.append([entry["label"], f"refused: {entry['refused']}", *[""] * 5])
            continue
        cells = [f"{quantile(entry[clock], 0.5):.3g}" for clock in ("wall_s", "cpu_s")]
        cells += [spread(ratios(entry, first, clock), 3) for clock in ("wall_s", "cpu_s")]
        rows.append([entry["label"], *cells, megabytes(entry, 1), f"{entry['error']:.1e}"])
    return table(columns, rows)
