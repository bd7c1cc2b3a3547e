"""Tables and figures of the threshold, the ratio loss, trainers' steps, and growth of cost."""

import math

from benchmarks.tables import (
    DTYPES,
    Run,
    about,
    cell,
    median_ratio,
    megabytes,
    named,
    processor_of,
    quantile,
    seconds_table,
    table,
)
from trainer.report.charts import Mark, Panel, Series

SWEEPS = {"tokens": "tokens", "vocabulary": "vocabulary", "fraction": "fraction of tokens"}

CLOCKS = ("wall_s", "cpu_s")
PARTS = ("weights", "gradients", "moments")

Points = list[tuple[float, float, float, float]]


def threshold_in_short(runs: list[Run]) -> str:
    """A column a number of entropies."""
    runs = sorted(runs, key=lambda run: run["shape"]["entropies"])
    rows = [["time, ours / torch.kthvalue"], ["MB beyond them, ours"], ["MB, torch.kthvalue"]]
    for run in runs:
        ours, other = named(run, "ours"), named(run, "kthvalue")
        rows[0].append(cell(median_ratio(ours, other)))
        rows[1].append(megabytes(ours, 1))
        rows[2].append(megabytes(other, 1))
    return table(["threshold of", *(f"{r['shape']['entropies']:,} entropies" for r in runs)], rows)


def ratio_loss_in_short(runs: list[Run]) -> str:
    """A column a number of tokens."""
    runs = sorted(runs, key=_tokens)
    row = ["time, ours / eager with its metrics"]
    row += [cell(median_ratio(named(run, "cpu"), run["contestants"][0])) for run in runs]
    return table(["ratio loss of", *(f"{_tokens(run):,} tokens" for run in runs)], [row])


def _tokens(run: Run) -> int:
    return math.prod(run["shape"].values())


def threshold_tables(runs: list[Run]) -> str:
    """Everything about the threshold."""
    runs = sorted(runs, key=lambda run: run["shape"]["entropies"])
    parts = [f"{r['shape']['entropies']:,} entropies\n\n{seconds_table(r)}" for r in runs]
    return "\n\n".join(["**Threshold**", *parts, about(runs[-1])])


def ratio_loss_tables(runs: list[Run]) -> str:
    """Everything about the ratio loss."""
    runs = sorted(runs, key=_tokens)
    parts = [
        f"{r['shape']['sequences']:,} x {r['shape']['length']:,} tokens\n\n{seconds_table(r)}"
        for r in runs
    ]
    return "\n\n".join(["**Ratio loss, its gradient and its metrics**", *parts, about(runs[-1])])


def trl_step_tables(runs: list[Run]) -> str:
    """Everything about the step of TRL's trainer."""
    parts = []
    for run in runs:
        shape = "{sequences:,} prompts of {prompt:,} tokens, completions of {completion:,}".format(
            **run["shape"]
        )
        size = "hidden size {hidden:,}, vocabulary {vocabulary:,}".format(**run["shape"])
        parts.append(f"{shape}, {size}\n\n{seconds_table(run)}")
    title = "**TRL's GRPOTrainer: loss and backward of a micro-batch, one layer**"
    return "\n\n".join([title, *parts, about(runs[-1])])


def train_step_tables(runs: list[Run]) -> str:
    """Everything about the trainer's step."""
    title = (
        "**The trainer's step: forward, loss, backward, clipping, AdamW; checkpointed layers.** "
        "MB beyond is the peak minus all weights, gradients and moments. With logits the peak is in "
        "the head's backward, before the layers have gradients."
    )
    parts = [title]
    for run in sorted(runs, key=lambda run: run["shape"]["layers"]):
        parts += [_train_step_table(run), about(run)]
    return "\n\n".join(parts)


def _train_step_table(run: Run) -> str:
    shape = run["shape"]
    tokens = shape["sequences"] * (shape["prompt"] + shape["response"])
    model = "{layers} layers, hidden size {hidden:,}, vocabulary {vocabulary:,}".format(**shape)
    timed = run["rounds"] > 1  # One round is for memory: nothing alternates.
    columns = ["", *(["tokens/s", "time / eager", "head's share"] if timed else [])]
    columns += [*(f"MB {part}" for part in PARTS), "MB beyond"]
    rows = []
    for entry in run["contestants"]:
        cells = [entry["label"], *(_speed(run, entry, tokens) if timed else [])]
        cells += [f"{entry[f'{part}_bytes'] / 1e6:,.0f}" for part in PARTS]
        state = sum(entry[f"{part}_bytes"] for part in PARTS)
        rows.append([*cells, f"{(entry['peak_bytes'] - state) / 1e6:,.0f}"])
    return f"Qwen3 of {model}; {tokens:,} tokens\n\n{table(columns, rows)}"


def _speed(run: Run, entry: Run, tokens: int) -> list[str]:
    """Tokens a second, the time against the first contestant's, and the head's share of it."""
    rate, share = tokens / quantile(entry["wall_s"], 0.5), quantile(_shares(entry), 0.5)
    return [f"{rate:,.1f}", cell(median_ratio(entry, run["contestants"][0])), f"{share:.1%}"]


def _shares(entry: Run) -> list[float]:
    """Of each round: the head's seconds over the step's."""
    return [head / step for head, step in zip(entry["head_s"], entry["wall_s"], strict=True)]


def cost_in_short(runs: list[Run]) -> str:
    """Exponents of the fits, and how far the fractions are from a straight line."""
    rows = []
    for sweep, label in SWEEPS.items():
        values = sorted(point[0] for point in cost_points(runs[0], sweep))
        row = [f"{label}, {values[0]:,g} to {values[-1]:,g}"]
        for run in runs:
            wall, cpu = (cost_points(run, sweep, clock) for clock in ("wall_s", "cpu_s"))
            if sweep == "fraction":
                row.append(f"straight within {deviation(wall):.0%} (CPU {deviation(cpu):.0%})")
            else:
                row.append(f"exponent {exponent(wall):.2f} (CPU {exponent(cpu):.2f})")
        rows.append(row)
    return table(["growth of the time of a step", *(DTYPES[run["dtype"]] for run in runs)], rows)


def cost_tables(runs: list[Run]) -> str:
    """Seconds of all points, and the fits."""
    rows = []
    for entry in runs[0]["contestants"]:
        same = [named(run, entry["name"]) for run in runs]
        row = [entry["label"], cell(entry.get("units"))]
        for other in same:
            row += [cell(quantile(other[c], 0.5), 3) if c in other else "" for c in CLOCKS]
        rows.append(row)
    columns = [f"{DTYPES[run['dtype']]} {what} s" for run in runs for what in ("wall", "CPU")]
    parts = ["**Growth of cost**", table(["", "units", *columns], rows), cost_in_short(runs)]
    return "\n\n".join([*parts, "\n".join(about(run) for run in runs)])


def cost_points(run: Run, sweep: str, clock: str = "wall_s") -> Points:
    """(value, p20, p50, p80) of one sweep."""
    return [
        (entry["value"], *(quantile(entry[clock], q) for q in (0.2, 0.5, 0.8)))
        for entry in run["contestants"]
        if entry["sweep"] == sweep and clock in entry
    ]


def cost_panels(runs: list[Run]) -> list[Panel]:
    """How cost grows on one make: a panel per sweep, a line per dtype."""
    panels = []
    make = processor_of(runs[0]).make
    for sweep, label in SWEEPS.items():
        lines = []
        for color, run in enumerate(runs):
            points = cost_points(run, sweep)
            name = DTYPES[run["dtype"]]
            label_of_line = name if sweep == "fraction" else f"{name}, slope {exponent(points):.2f}"
            marks = [Mark(x, y, low, high) for x, low, y, high in sorted(points)]
            lines.append(Series(label_of_line, marks, color, dots=True))
        log = sweep != "fraction"
        panels.append(Panel(make, label, lines, log, log, zero=not log, unit="seconds of a step"))
    return panels


def exponent(points: Points) -> float:
    """b of the least-squares fit time = a * value^b, in logarithms, of the medians."""
    _, slope = _line([(math.log(x), math.log(y)) for x, _, y, _ in points])
    return slope


def deviation(points: Points) -> float:
    """The largest relative distance of a median from the least-squares line through all."""
    start, slope = _line([(x, y) for x, _, y, _ in points])
    return max(abs(y / (start + slope * x) - 1) for x, _, y, _ in points)


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = covariance / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope
