"""A run's folder as one page: report.html, which opens offline and asks nothing of the network."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2

from trainer.log import other_version, read_rows, read_run, replace_text
from trainer.report_figures import FIGURES, Row, draw, points

SAMPLES_A_STEP = 4
TOKENS_A_SAMPLE = 400
HEAT_LEVELS = 10


def write_report(run_folder: Path) -> Path:
    """Write `run_folder`/report.html from run.json, metrics.jsonl and samples.jsonl; its path.

    Works while the run goes on. Raises ValueError where run.json is missing or metrics.jsonl is
    missing or empty.
    """
    run_folder = Path(run_folder)
    metrics_path = run_folder / "metrics.jsonl"
    run = read_run(run_folder)
    if not metrics_path.exists():
        raise ValueError(f"{metrics_path} is missing: {run_folder} is not the folder of a run")
    rows = read_rows(metrics_path)
    if not rows:
        raise ValueError(f"{metrics_path} is empty: the run has not finished a step yet")
    samples_path = run_folder / "samples.jsonl"
    samples = read_rows(samples_path) if samples_path.exists() else []
    try:
        page = _template().render(
            name=run["config"]["name"],
            facts=_facts(run, rows),
            tiles=_tiles(run["config"], rows),
            figures=[draw(figure, rows) for figure in FIGURES],
            nonfinite=sum(row.get("log/nonfinite") or 0 for row in rows),
            metrics=_table(rows),
            **_samples(samples),
        )
    except KeyError as error:
        raise other_version(run_folder, error) from error
    path = run_folder / "report.html"
    # "replace": a byte-level tokenizer can leave halves of a character behind.
    replace_text(path, page.encode("utf-8", "replace").decode())
    return path


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [y for _, y in points(rows, key) if y is not None]


def _facts(run: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The header: what was run, on what, from which code."""
    config, last = run["config"], run["starts"][-1]
    algorithm, rollout, optimizer = config["algorithm"], config["rollout"], config["optimizer"]
    tokens = "all tokens"
    if algorithm["fraction"] < 1:
        kept = f"{algorithm['which']} {algorithm['fraction']:.0%} of tokens"
        tokens = f"{kept} by {algorithm['entropy_source']} entropy"
    began = datetime.fromisoformat(run["starts"][0]["time"])
    seconds = sum(_values(rows, "time/step")) + sum(_values(rows, "time/evaluate"))
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = dict.fromkeys(
        start["commit"][:10] + (" + edits" if start["dirty"] else "") for start in run["starts"]
    )
    starts = f", in {len(run['starts'])} starts" if len(run["starts"]) > 1 else ""
    return [
        ("Model", f"{config['model']['path']}, {config['model']['dtype']}"),
        ("Task", config["data"]["task"]),
        ("Objective", f"{algorithm['loss_type']}, {tokens}"),
        ("Batch", f"{rollout['prompts']} prompts, {rollout['group_size']} responses each"),
        ("Steps", f"{rows[-1]['step']:,} of {config['steps']:,}, seed {config['seed']}"),
        (
            "Updates",
            f"{optimizer['mini_batches']} a step, learning rate {optimizer['learning_rate']:g}",
        ),
        ("Time", f"{timedelta(seconds=round(seconds))}{starts}, from {began:%Y-%m-%d %H:%M} UTC"),
        ("Code", ", then ".join(commits)),
        ("Versions", versions),
        ("Machine", ", ".join(text for text in (last["device"], last["platform"]) if text)),
    ]


def _tiles(config: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, str]]:
    """The headline numbers."""
    return [
        _change("Held-out accuracy", rows, "eval/accuracy", config["eval"]["problems"]),
        _change("Held-out accuracy, greedy", rows, "eval/greedy", config["eval"]["problems"]),
        _share("Time in the LM head", rows, "time/head", "time/step", "of step time"),
        _share("Rows in backward", rows, "head/active_rows", "head/rows", "of head rows"),
    ]


def _change(title: str, rows: Sequence[Row], key: str, problems: int) -> dict[str, str]:
    """First and last value of a share, and the difference in points with its 95 % interval."""
    known = [(x, y) for x, y in points(rows, key) if y is not None]
    if len(known) < 2:
        return {
            "title": title,
            "value": "n/a",
            "unit": "",
            "note": f"fewer than two values of {key}",
        }
    (start, first), (step, last) = known[0], known[-1]
    # Two independent shares; on the same problems the true interval is rather smaller.
    error = math.sqrt((first * (1 - first) + last * (1 - last)) / problems)
    return {
        "title": title,
        "value": f"{100 * (last - first):+.1f}",
        "unit": f"± {196 * error:.1f} points",
        "note": f"{first:.1%} at step {start:,}, {last:.1%} at step {step:,} "
        f"({problems:,} problems, 95% interval)",
    }


def _share(title: str, rows: Sequence[Row], part: str, whole: str, of: str) -> dict[str, str]:
    """The sum of one metric over the sum of another, where a row has both."""
    both = [row for row in rows if row.get(part) is not None and row.get(whole)]
    if not both:
        note = f"no {part} and {whole} were logged"
        return {"title": title, "value": "n/a", "unit": "", "note": note}
    parts, wholes = sum(row[part] for row in both), sum(row[whole] for row in both)
    seconds = " s" if part.startswith("time/") else ""
    counts = f"{parts:,.0f}{seconds} of {wholes:,.0f}{seconds}"
    return {"title": title, "value": f"{parts / wholes:.1%}", "unit": of, "note": counts}


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Every metric: name, first, last, least and greatest value."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    table = []
    for key in sorted(keys):
        if values := _values(rows, key):
            shown = (values[0], values[-1], min(values), max(values))
            table.append((key, *(f"{value:.5g}" for value in shown)))
    return table


def _samples(samples: Sequence[Row]) -> dict[str, Any]:
    """Responses of the first and the last sampled step, their tokens graded by entropy."""
    steps = sorted({sample["step"] for sample in samples})
    shown = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        shown.append((step, [s for s in samples if s["step"] == step][:SAMPLES_A_STEP]))
    values = [h for _, group in shown for s in group for h in s["entropy"] if h is not None]
    # One scale for all: the 98th percentile, lest one odd token bleach the rest.
    top = max(sorted(values)[int(0.98 * (len(values) - 1))], 0.1) if values else 1.0
    columns = [
        {"step": step, "samples": [_sample(sample, top) for sample in group]}
        for step, group in shown
    ]
    return {"columns": columns, "top": f"{top:.2g}", "levels": range(HEAT_LEVELS + 1)}


def _sample(sample: Row, top: float) -> dict[str, Any]:
    tokens = []
    for text, entropy, kept in zip(
        sample["tokens"], sample["entropy"], sample["kept"], strict=True
    ):
        level = 0 if entropy is None else round(min(entropy / top, 1) * HEAT_LEVELS)
        number = "entropy not finite" if entropy is None else f"{entropy:.3f} nats"
        tokens.append(
            {
                "text": _visible(text),
                "class": f"h{level}{' k' if kept else ''}",
                "title": number + (", kept" if kept else ""),
            }
        )
    return {
        "prompt": _visible(sample["prompt"], ends="\n"),
        "reward": "n/a" if sample["reward"] is None else f"{sample['reward']:g}",
        "right": (sample["reward"] or 0) > 0,
        "tokens": tokens[:TOKENS_A_SAMPLE],
        "more": max(0, len(tokens) - TOKENS_A_SAMPLE),
        "kept": sum(map(bool, sample["kept"])),
        "length": len(tokens),
    }


def _visible(text: str, ends: str = "↵\n") -> str:
    """`text` with line ends as `ends`, other control characters as their pictures (U+2400 on)."""
    shown = (c if c >= " " or c in "\n\t" else chr(0x2400 + ord(c)) for c in text)
    return "".join(shown).replace("\n", ends)
