"""The tables of a pretrained model: its steps, head and engines."""

import json
from pathlib import Path

from benchmarks.real_model.kept import HEAD, STEPS
from benchmarks.tables import Run, about, cell, median_ratio, named, quantile, table

BACKBONE = ("forward", "backward", "embedding")
SCORING = ("scoring", "scoring head")
# Steps of README.md, each beside its baseline.
SHORT = (
    ("trl-patched", "trl"),
    ("ours-all", "eager-all"),
    ("ours", "eager"),
    ("ours-mask", "eager"),
    ("ours-known", "eager"),
    ("ours-support", "eager-support"),
)

ENGINE_LABELS = {
    "transformers": "engine transformers, with log-probs and entropies",
    "vllm": "engine vllm, the same",
    "generate": "transformers' generate(), dynamic cache",
    "generate-static": "transformers' generate(), static cache",
    "generate-compiled": "transformers' generate(), static cache, compiled",
}


def in_short(results: Path) -> list[str]:
    """README.md's tables, one for each result file."""
    return [_in_short(run) for run in _read(results, STEPS).values()]


def _in_short(run: Run) -> str:
    rows = []
    for name, other in SHORT:
        one, whole = named(run, name), named(run, other)
        if "wall_s" in one and "wall_s" in whole:
            peaks = [f"{beyond(run, x) / 1e9:.2f}" for x in (one, whole)]
            cells = [cell(median_ratio(one, whole)), cell(update_ratio(one, whole)), *peaks]
            rows.append([one["label"], *cells])
    columns = ["", "step / baseline", "update / baseline", "GB beyond the state", "baseline's"]
    baseline = "The baseline holds all logits; that of `patch_trl()` is TRL's own head."
    return f"{_title(run)} {baseline}\n\n{table(columns, rows)}\n\n{about(run)}"


def of(results: Path) -> list[str]:
    """What docs/benchmarks.md shows, if there are results in the folder."""
    steps, heads = _read(results, STEPS), _read(results, HEAD)
    found = []
    for measured in sorted(steps | heads):
        if (run := steps.get(measured)) is not None:
            found += [_title(run), _steps(run), about(run)]
        if (run := heads.get(measured)) is not None:
            found += ["The head alone, on the states of the same answers:", _heads(run), about(run)]
    engines = results / "real_model" / "engines.json"
    if engines.exists():
        found += ["Tokens per second:", engines_table(json.loads(engines.read_text()))]
    return ["\n\n".join(found)] if found else []


def _read(results: Path, pattern: str) -> dict[str, Run]:
    """The runs of all files that match, by what their names say of model and machine."""
    start = pattern.index("*")
    return {
        path.name[start:]: json.loads(path.read_text()) for path in sorted(results.glob(pattern))
    }


def _title(run: Run) -> str:
    shape = run["shape"]
    return (
        f"**A pretrained model.** {run['model']}: D = {shape['hidden']:,}, "
        f"V = {shape['vocabulary']:,}; {shape['sequences']} of its answers, "
        f"{shape['tokens']:,} tokens in all, fp32, checkpointed layers, one micro-batch. An update "
        "is a step without its scoring pass. The state is weights, gradients and AdamW's moments."
    )


def beyond(run: Run, entry: Run) -> int:
    """The peak of a step beyond weights, moments and gradients."""
    return max(entry["peak_bytes"] - run["bytes"]["gradients"], 0)


def update_ratio(entry: Run, other: Run) -> float:
    """The p50 over rounds of the seconds without scoring, against the other's."""
    mine, theirs = (
        _seconds(x, ("forward", "head", "backward", "embedding", "optimizer"))
        for x in (entry, other)
    )
    return quantile([a / b for a, b in zip(mine, theirs, strict=True)], 0.5)


def _seconds(entry: Run, names: tuple[str, ...]) -> list[float]:
    return [sum(parts) for parts in zip(*(entry["parts_s"][name] for name in names), strict=True)]


def _steps(run: Run) -> str:
    columns = ["seconds", "step", "scoring", "backbone", "head", "optimizer"]
    columns += ["head's share", "loss", "MB scoring", "MB backbone", "MB head", "MB optimizer"]
    rows = []
    for entry in run["contestants"]:
        parts = [_seconds(entry, names) for names in (SCORING, BACKBONE, ("head",), ("optimizer",))]
        head = [x / y for x, y in zip(parts[2], entry["wall_s"], strict=True)]
        cells = [entry["label"], f"{quantile(entry['wall_s'], 0.5):.2f}"]
        cells += [f"{quantile(part, 0.5):.2f}" for part in parts]
        cells += [f"{quantile(head, 0.5):.0%}", f"{entry['sums']['loss']:.6g}"]
        for names in (SCORING, BACKBONE, ("head",), ("optimizer",)):
            peak = max(entry["part_peak_bytes"].get(name, 0) for name in names)
            cells.append(f"{peak / 1e6:,.0f}")
        rows.append(cells)
    gradients = run["bytes"]["gradients"] / 1e6
    note = (
        f"MB are above weights and moments; gradients, {gradients:,.0f} MB of them, come during "
        "head and backbone."
    )
    if named(run, "trl"):
        note += (
            " TRL divides its loss by all response tokens, the others by the selected ones. So its "
            "loss is that of ours, 20%, times selected / all."
        )
    return f"{table(columns, rows)}\n\n{note}"


def _heads(run: Run) -> str:
    first = run["contestants"][0]
    rows = []
    for entry in run["contestants"]:
        if "refused" in entry:
            rows.append([entry["label"], f"refused: {entry['refused']}", "", ""])
            continue
        cells = [f"{quantile(entry['wall_s'], 0.5):.2f}", cell(median_ratio(entry, first))]
        rows.append([entry["label"], *cells, f"{entry['error']:.0e}"])
    return table(["", "s", f"/ {first['name']}", "error"], rows)


def engines_table(found: Run) -> str:
    """Tokens per second of each engine, p50 over rounds."""
    rows = []
    for entry in found["engines"]:
        label = ENGINE_LABELS[entry["name"]]
        if "refused" in entry:
            rows.append([label, f"refused: {entry['refused']}"])
            continue
        speeds = [n / s for n, s in zip(entry["tokens"], entry["wall_s"], strict=True)]
        rows.append([label, f"{quantile(speeds, 0.5):.0f}"])
    asked, named_versions = found["requests"], found["versions"].items()
    small = ", ".join(f"{name} {number}" for name, number in named_versions)
    return (
        f"{table(['engine', 'tokens/s'], rows)}\n\n<sub>{asked['prompts']} prompts, "
        f"{asked['each']} answers each of {asked['new_tokens']} tokens at most, fp32; "
        f"{found['machine']}, {found['threads']} threads; {small}; commit {found['commit']}; "
        f"{found['date']}.</sub><br>"
    )
