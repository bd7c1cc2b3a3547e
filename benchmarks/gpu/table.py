"""Stage `table` writes table.md: measurements beside predictions and targets.

A share is of p50s that were measured in alternation.
"""

from benchmarks.gpu import predictions
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.setting import Setting

Line = list[str]


def run(setting: Setting) -> None:
    text = "\n\n".join(section for section in sections(setting.rows, setting) if section)
    path = setting.out / "table.md"
    path.write_text(text + "\n")
    setting.rows.log(text)
    setting.rows.log(f"wrote {path}")


def sections(rows: Rows, setting: Setting) -> list[str]:
    return [
        _about(rows),
        _small(rows),
        *(_steps(rows, stage, t, d) for t, d in setting.shapes for stage in ("peers", "verl")),
        _tiles(rows),
        _tools(rows),
    ]


def _about(rows: Rows) -> str:
    about = rows.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    summary = rows.of("correctness", name="summary")
    checked = "correctness: not run"
    if summary:
        failed = summary[0]["failed"]
        checked = f"correctness: {summary[0]['count']} cases, {len(failed)} failed"
        checked += "".join(f"; FAILED {name}" for name in failed[:5])
    return (
        f"{about['gpu'] or 'no GPU'}, driver {about['driver']}; {versions}; commit "
        f"{about['commit']}, sources {about['source']}; {about['date']}; {checked}. "
        "Predictions are of a cost model, made before any measurement."
    )


def _small(rows: Rows) -> str:
    """Floors, threshold and graphs."""
    lines: list[Line] = []
    for row in rows.of("environment", name="copy"):
        lines.append(["copy", "", _number(row.get("gb_per_s"), "GB/s"), _predicted_copy(), ""])
    for row in rows.of("floors"):
        predicted = predictions.FORWARD_TFLOPS.get(row["name"])
        hidden = row["hidden"]
        known = predicted and hidden in predictions.HIDDEN
        wanted = predicted[predictions.HIDDEN.index(hidden)] if predicted and known else None
        found = _number(row.get("tflops"), "TF/s") or _ms(row)
        lines.append([row["name"], f"D={hidden}", found, _number(wanted, "TF/s"), _failure(row)])
    for row in rows.of("threshold"):
        limit = f"< {predictions.THRESHOLD_MS:g} ms"
        lines.append([row["name"], f"N={row.get('entropies')}", _ms(row), limit, _failure(row)])
    for row in rows.of("graphs"):
        call = row.get("call_ms")
        note = f"{call:.3g} ms without a graph" if call else _failure(row)
        lines.append([f"{row['name']}, graph", f"D={row['hidden']}", _ms(row), "", note])
    return _table(["", "at", "measured", "predicted", ""], lines)


def _steps(rows: Rows, stage: str, tokens: int, hidden: int) -> str:
    found = {row["name"]: row for row in rows.of(stage, tokens=tokens, hidden=hidden)}
    if not found:
        return ""
    ours = found.get("triton-0.2", found.get("torch-0.2", {})).get("p50_ms")
    lines = []
    for name, row in found.items():
        p50, predicted = row.get("p50_ms"), predictions.milliseconds(name, tokens, hidden)
        lines.append(
            [
                row.get("label", name),
                f"{row['units']:.2g}" if "units" in row else "",
                _ms(row),
                _number(predicted, "ms"),
                f"{ours / p50:.2f}" if ours and p50 else "",
                _number(row.get("tflops"), ""),
                _gigabytes(row.get("peak_bytes")),
                _failure(row),
            ]
        )
    head = f"**T={tokens}, D={hidden}, V={row['vocabulary']}**"
    columns = ["", "units", "p50 (p20-p80)", "predicted", "ours / it", "TF/s", "peak GB", ""]
    return "\n\n".join([head, _table(columns, lines), *_targets(rows, stage, found)])


def _targets(rows: Rows, stage: str, found: dict[str, Row]) -> list[str]:
    """The targets, and whether they are met."""
    times = {name: row["p50_ms"] for name, row in found.items() if "p50_ms" in row}
    said = []
    wanted = predictions.VERL_TARGETS if stage == "verl" else predictions.TARGETS
    for ours, other, share in wanted:
        if ours in times and other in times:
            got = times[ours] / times[other]
            said.append(f"{ours} / {other}: {got:.2f}, wanted {share:g}: {_verdict(got <= share)}")
    forward = found.get("triton-forward", {}).get("tflops")
    hidden = next(iter(found.values()))["hidden"]
    floors = rows.of("floors", name="logits, 16-bit out", hidden=hidden)
    if forward and floors and stage == "peers":
        got = forward / floors[0]["tflops"]
        share = predictions.FORWARD_SHARE_OF_CUBLAS
        said.append(f"forward / cuBLAS: {got:.2f}, wanted {share:g}: {_verdict(got >= share)}")
    row = found.get("triton-0.2", {})
    if row.get("peak_bytes") and row["tokens"] == 32768:
        gradients = 2 * (row["tokens"] + row["vocabulary"]) * row["hidden"]
        got = row["peak_bytes"] - gradients
        said.append(
            f"peak above gradients: {got / 1e9:.2f} GB, wanted {predictions.PEAK_BYTES / 1e9:g}: "
            f"{_verdict(got <= predictions.PEAK_BYTES)}"
        )
    return ["; ".join(said)] if said else []


def _tiles(rows: Rows) -> str:
    lines = []
    for row in sorted(rows.of("sweep"), key=lambda r: (r["op"], r["hidden"], r.get("p50_ms", 1e9))):
        found = [row["name"], f"D={row['hidden']}", _ms(row), _number(row.get("tflops"), "TF/s")]
        lines.append([*found, _failure(row)])
    return _table(["tile", "at", "p50 (p20-p80)", "rate", ""], lines)


def _tools(rows: Rows) -> str:
    lines = []
    for row in rows.of("profile"):
        values = {k: v for k, v in row.items() if k not in ("stage", "name", "about", "error")}
        lines.append([row["name"], ", ".join(f"{k} {v}" for k, v in values.items()), _failure(row)])
    return _table(["tool", "found", ""], lines)


def _predicted_copy() -> str:
    return _number(predictions.COPY_GB_PER_S, "GB/s")


def _verdict(good: bool) -> str:
    return "yes" if good else "NO"


def _ms(row: Row) -> str:
    if "p50_ms" not in row:
        return ""
    return f"{row['p50_ms']:.4g} ({row['p20_ms']:.4g}-{row['p80_ms']:.4g}) ms"


def _number(value: float | None, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip() if value else ""


def _gigabytes(value: int | None) -> str:
    return f"{value / 1e9:.2f}" if value else ""


def _failure(row: Row) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    return row.get("error", "")


def _table(columns: Line, rows: list[Line]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in cells)} |" for cells in lines)
