"""Tables of a training step with what the sampler knows."""

from benchmarks.tables import Run, about, cell, median_ratio, quantile, table

BACKBONE = ("forward", "backward", "embedding")
SCORING = ("scoring", "scoring head")


def sampler_step_tables(runs: list[Run]) -> str:
    """Everything about the steps, the first model's first."""
    title = (
        "**A step with what the sampler knows.** 20% of the tokens, micro-batches of one sequence. "
        "The head's share is without the scoring pass's head. MB is the largest in a part beyond "
        "weights and moments."
    )
    parts = [title]
    for run in sorted(runs, key=lambda run: run["shape"]["model"], reverse=True):
        parts += [_heading(run), _times(run), _products(run), about(run, _sets(run))]
    return "\n\n".join(parts)


def _heading(run: Run) -> str:
    shape = run["shape"]
    tokens = shape["sequences"] * (shape["prompt"] + shape["response"])
    name = {"qwen3": "Qwen3-0.6B's shape", "gemma3": "Gemma 3 270M's shape"}[shape["model"]]
    size = "{layers} layers, hidden size {hidden:,}, vocabulary {vocabulary:,}".format(**shape)
    return f"{name}: {size}; {tokens:,} tokens"


def _times(run: Run) -> str:
    first = run["contestants"][0]
    columns = ["seconds", "step", f"/ {first['name']}", "scoring", "backbone", "head"]
    columns += ["optimizer", "scoring's share", "head's share"]
    rows = []
    for entry in run["contestants"]:
        if "refused" in entry:
            refused = f"refused: {entry['refused']}"
            rows.append([entry["label"], refused, *[""] * (len(columns) - 2)])
            continue
        cells = [entry["label"], f"{quantile(entry['wall_s'], 0.5):.2f}"]
        cells.append(cell(median_ratio(entry, first)))
        for names in (SCORING, BACKBONE, ("head",), ("optimizer",)):
            cells.append(f"{quantile(seconds(entry, names), 0.5):.2f}")
        cells += [f"{share(entry, names):.1%}" for names in (SCORING, ("head",))]
        rows.append(cells)
    return table(columns, rows)


def _products(run: Run) -> str:
    columns = ["products, counted", "the head's, of T x D x V", "by the formula"]
    columns += ["scoring's share of all", "head's share of all"]
    columns += ["MB scoring", "MB backbone", "MB head", "MB optimizer"]
    rows = []
    for entry in run["contestants"]:
        if "refused" in entry:
            continue
        cells = [entry["label"], f"{entry['units']:.4f}", f"{entry['formula_units']:.4f}"]
        for names in (SCORING, ("head",)):
            part = sum(entry["products"].get(name, 0) for name in names)
            cells.append(f"{part / sum(entry['products'].values()):.2%}")
        for names in (SCORING, BACKBONE, ("head",), ("optimizer",)):
            peaks = [entry["part_peak_bytes"].get(name, 0) for name in names]
            cells.append(f"{max(peaks) / 1e6:,.0f}")
        rows.append(cells)
    return table(columns, rows)


def seconds(entry: Run, names: tuple[str, ...]) -> list[float]:
    """The seconds of these parts together, for each round."""
    return [sum(parts) for parts in zip(*_parts(entry, names), strict=True)]


def _parts(entry: Run, names: tuple[str, ...]) -> list[list[float]]:
    """Files before "embedding" was a part have it in "optimizer"."""
    return [entry["parts_s"][name] for name in names if name in entry["parts_s"]]


def share(entry: Run, names: tuple[str, ...]) -> float:
    """The p50 of these parts' seconds over the step's."""
    parts = zip(seconds(entry, names), entry["wall_s"], strict=True)
    return quantile([part / step for part, step in parts], 0.5)


def _sets(run: Run) -> str:
    sets = run["sets"]
    return (
        f"; sets of {sets['mean']:.1f} ids in the mean, {sets['singletons']:.0%} of one id, 99% up "
        f"to {sets['p99']:.0f}, those trained on {sets['selected_mean']:.1f} in the mean"
    )
