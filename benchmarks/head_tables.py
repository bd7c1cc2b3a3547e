"""Tables and the figure of linear_logprob_entropy, and of it against its bare products."""

from typing import Any

from benchmarks.tables import (
    BYTES,
    DTYPES,
    Run,
    about,
    by_shape,
    cell,
    median_ratio,
    megabytes,
    named,
    processor_of,
    quantile,
    ratios,
    spread,
    table,
)
from entropy_kernels._bench.contestant import EVERYTHING
from trainer.report.charts import Mark, Panel, Series

OURS = "cpu"
FRACTIONS = (1.0, 0.5, 0.2, 0.1)
NAMES = {"cpu": "ours, compiled", "torch": "ours, PyTorch", "floor": "torch.mm alone"}
# The libraries that compute the bare products, with their names in a table.
LIBRARIES = {"mm": "torch.mm", "mm-onednn": "torch.mm by oneDNN"}
# Others' heads with the same products.
HEADS = {"trl": "TRL's head", "lce-chunked": "torch's in chunks, no entropies"}


def in_short(runs: list[Run], floors: list[Run]) -> str:
    """One column per run: the few numbers for the speed, memory and error of ours."""
    ordered = [run for shape in by_shape(runs) for run in shape]
    columns = [
        f"{run['shape']['tokens']} x {run['shape']['hidden']} x {run['shape']['vocabulary']}, "
        f"{DTYPES[run['dtype']]}"
        for run in ordered
    ]
    facts = [_facts(run, floors) for run in ordered]
    rows = [[name, *(x[name] for x in facts)] for name in facts[0]]
    return table(["", *columns], [row for row in rows if any(row[1:])])


def _facts(run: Run, floors: list[Run]) -> dict[str, str]:
    eager, fifth = run["contestants"][0], named(run, f"{OURS}-0.2")
    by_onednn = named(run, "eager-onednn")
    with_entropies, without = fastest_others(run)
    floor = next((x for x in floors if all(x[k] == run[k] for k in ("shape", "dtype"))), None)
    products = {
        f"{direction} / its products by the faster library, {threads_of(n)}": cell(
            floor and over_the_best(floor, direction, n)
        )
        for direction in ("forward", "backward")
        for n in sorted({1, run["threads"]})
    }
    beyond = fifth["peak_bytes"] - _gradient_bytes(run) if fifth.get("peak_bytes") else None
    return {
        "20% of the tokens / eager": cell(median_ratio(fifth, eager)),
        "all tokens / eager": cell(median_ratio(named(run, f"{OURS}-1"), eager)),
        "20% / eager with oneDNN's products": cell(median_ratio(fifth, by_onednn)),
        "all tokens / eager with oneDNN's products": cell(
            median_ratio(named(run, f"{OURS}-1"), by_onednn)
        ),
        "20%, known beforehand / eager": cell(median_ratio(named(run, f"{OURS}-0.2-known"), eager)),
        **{
            f"{fraction:.0%} / the fastest other with entropies": _against(
                named(run, f"{OURS}-{fraction:g}"), with_entropies
            )
            for fraction in FRACTIONS
        },
        "20% / the fastest other without entropies": _against(fifth, without),
        **products,
        "MB beyond the gradients at 20%": cell(None if beyond is None else beyond / 1e6, 0),
        "error of the gradients / eager's": cell(_error_ratio(fifth, eager)),
    }


def fastest_others(run: Run) -> tuple[Run, Run]:
    """The fastest of the others that have entropies, and of those that compute less; or empty."""
    groups: dict[bool, list[Run]] = {True: [], False: []}
    for entry in run["contestants"]:
        others = entry["name"] != "floor" and not entry["label"].startswith("ours")
        if "wall_s" in entry and others:
            groups[has_entropies(entry)].append(entry)
    with_entropies, without = (
        min(group, key=lambda entry: quantile(entry["wall_s"], 0.5), default={})
        for group in (groups[True], groups[False])
    )
    return with_entropies, without


def has_entropies(entry: Run) -> bool:
    """Older files say it in the label alone."""
    if "computes" in entry:
        return "entropies" in entry["computes"]
    return "no entropies" not in entry["label"]


def _against(entry: Run, other: Run) -> str:
    against = cell(median_ratio(entry, other))
    return f"{against} ({other['name']})" if against else ""


def computes_table(runs: list[Run]) -> str:
    """Who computes what: a row per set of results; empty where no file says it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        for entry in run["contestants"]:
            if "wall_s" in entry and "computes" in entry:
                names = found.setdefault(tuple(entry["computes"]), [])
                names += [] if entry["name"] in names else [entry["name"]]
    if not found:
        return ""
    rows = [
        [", ".join(names), *("yes" if x in computes else "" for x in EVERYTHING)]
        for computes, names in sorted(found.items(), key=lambda item: -len(item[0]))
    ]
    note = (
        "What each computes in a step. A selection is one that it finds itself, exactly. The "
        "others are told the tokens, as a mask on their loss. They take as long at any fraction. "
        "Those that know the tokens beforehand have the log-probs of these tokens alone."
    )
    return f"{note}\n\n{table(['', *EVERYTHING], rows)}"


def _gradient_bytes(run: Run) -> int:
    shape = run["shape"]
    rows = shape["tokens"] + shape["vocabulary"]
    return rows * shape["hidden"] * BYTES[run["dtype"]]


def _error_ratio(entry: Run, other: Run) -> float | None:
    """The larger error of the two gradients, against the other's."""
    if "errors" not in entry or "errors" not in other:
        return None
    mine, theirs = (max(x["errors"][g] for g in ("dhidden", "dweight")) for x in (entry, other))
    return mine / theirs


def section(runs: list[Run], make_table: Any) -> str:
    """The runs of one shape under a heading."""
    shape = runs[0]["shape"]
    head = (
        f"**{shape['tokens']:,} tokens, hidden size {shape['hidden']:,}, "
        f"vocabulary {shape['vocabulary']:,}**"
    )
    return "\n\n".join([head, make_table(runs), "\n".join(_about(run) for run in runs)])


def _about(run: Run) -> str:
    eager = quantile(run["contestants"][0]["wall_s"], 0.5)
    gradients = _gradient_bytes(run) / 1e6
    more = f"; eager takes {eager:.1f} s; the gradients alone are {gradients:,.0f} MB"
    return about(run, more)


def compact(runs: list[Run]) -> str:
    """One row per contestant, and one for torch: units, and times and memory for each dtype."""
    # The longest list first: what one dtype alone has keeps its place.
    longest_first = sorted(runs, key=lambda run: -len(run["contestants"]))
    every = [entry["name"] for run in longest_first for entry in run["contestants"]]
    names = list(dict.fromkeys(every))
    if any(name.startswith(f"{OURS}-") for name in names):
        names = [n for n in names if not n.startswith("torch-") or n == "torch-0.2"]
    columns = [f"{DTYPES[run['dtype']]} {what}" for run in runs for what in ("wall", "CPU", "MB")]
    rows = []
    for name in names:
        entries = [named(run, name) for run in runs]
        units = next((f"{entry['units']:.2f}" for entry in entries if "units" in entry), "")
        label = next(entry["label"] for entry in entries if entry)
        cells = [label, units]
        for run, entry in zip(runs, entries, strict=True):
            cells += [_time(run, entry, "wall_s"), _time(run, entry, "cpu_s"), megabytes(entry)]
        rows.append(cells)
    return table(["time against eager: p50 (p20-p80)", "units", *columns], rows)


def _time(run: Run, entry: Run, clock: str) -> str:
    if clock not in entry:
        return "refused" if "refused" in entry else ""
    return spread(ratios(entry, run["contestants"][0], clock), 2)


def full(runs: list[Run]) -> str:
    """One table per dtype, with seconds, CPU time and errors."""
    columns = ["", "wall s", "CPU s", "wall / eager", "CPU / eager", "MB", "flops", "units"]
    parts = []
    for run in runs:
        rows = []
        for entry in run["contestants"]:
            cells = [entry["label"]]
            if "refused" in entry:
                rows.append([*cells, f"refused: {entry['refused']}", *[""] * 7])
                continue
            eager = run["contestants"][0]
            cells += [spread(entry[clock], 2) for clock in ("wall_s", "cpu_s")]
            cells += [spread(ratios(entry, eager, clock), 3) for clock in ("wall_s", "cpu_s")]
            cells += [megabytes(entry), f"{entry['flops']:.3g}", f"{entry['units']:.2f}"]
            rows.append([*cells, f"{entry['error']:.1e}"])
        parts.append(f"{DTYPES[run['dtype']]}\n\n{table([*columns, 'error'], rows)}")
    return "\n\n".join(parts)


def over_the_best(run: Run, direction: str, threads: int) -> float | None:
    """Our time over that of the fastest library's bare products, on the clock that counts."""
    clock = "cpu_s" if threads == 1 else "wall_s"
    entries = {name: named(run, f"{direction}-{name}-{threads}") for name in (*LIBRARIES, OURS)}
    found = [median_ratio(entries[OURS], entries[name], clock) for name in LIBRARIES]
    return max((ratio for ratio in found if ratio is not None), default=None)


def floor_tables(runs: list[Run]) -> str:
    """The head against the products that it contains, in 10^9 operations per second."""
    parts = []
    columns = [*(f"{LIBRARIES[name]}, GF/s" for name in LIBRARIES), "ours, GF/s", "ours / the best"]
    columns.append("ours into fresh memory, GF/s")
    columns += [f"{name}, GF/s" for name in HEADS.values()]
    for run in (run for shape in by_shape(runs) for run in shape):
        shape = " x ".join(str(size) for size in run["shape"].values())
        rows = []
        for direction in ("forward", "backward"):
            for n in sorted({1, run["threads"]}):
                clock = "cpu_s" if n == 1 else "wall_s"
                entries = [named(run, f"{direction}-{name}-{n}") for name in (*LIBRARIES, OURS)]
                rates = [_rate(entry, clock) for entry in entries]
                fresh = _rate(named(run, f"{direction}-{OURS}-fresh-{n}"), clock)
                ratio = cell(over_the_best(run, direction, n))
                others = [_rate(named(run, f"{direction}-{name}-{n}"), clock) for name in HEADS]
                rows.append([f"{direction}, {threads_of(n)}", *rates, ratio, fresh, *others])
        head = f"The head against its products, {shape}, {DTYPES[run['dtype']]}"
        parts.append(f"{head}\n\n{table(['', *columns], rows)}\n\n{about(run)}")
    return "\n\n".join(parts)


def _rate(entry: Run, clock: str) -> str:
    if clock not in entry:
        return "refused" if "refused" in entry else ""
    return spread([entry["flops"] / seconds / 1e9 for seconds in entry[clock]], 0)


def threads_of(n: int) -> str:
    return "one thread" if n == 1 else f"{n} threads"


def panel(run: Run) -> Panel:
    """The CPU time of one run, the steadier clock, against eager by fraction of tokens."""
    lines: dict[str, list[Mark]] = {}
    eager = run["contestants"][0]
    for entry in run["contestants"]:
        if "wall_s" not in entry:
            continue
        low, middle, high = (quantile(ratios(entry, eager, "cpu_s"), q) for q in (0.2, 0.5, 0.8))
        impl, _, rest = entry["name"].partition("-")
        if rest.replace(".", "").isdigit():
            lines.setdefault(impl, []).append(Mark(float(rest), middle, low, high))
        elif entry["name"] == "floor":
            # Measured where 1 + 3 x 0.2 products are; all products cost the same.
            for fraction in (0.0, 1.0):
                at = middle / entry["units"] * (1 + 3 * fraction)
                lines.setdefault("floor", []).append(Mark(fraction, at, at, at))
    shape, one = run["shape"], [Mark(fraction, 1.0, 1.0, 1.0) for fraction in (0.0, 1.0)]
    shown = [
        Series(NAMES[name], sorted(lines[name]), color, style)
        for name, color, style in (("cpu", 0, ""), ("torch", 1, ""), ("floor", 6, "dashed"))
        if name in lines
    ]
    return Panel(
        f"{processor_of(run).make}, {DTYPES[run['dtype']]}, {shape['tokens']} x {shape['hidden']} "
        f"x {shape['vocabulary']}",
        "fraction of tokens trained on",
        [*shown, Series("eager", one, 6)],
        zero=True,
        unit="CPU time of a step, eager = 1",
    )
