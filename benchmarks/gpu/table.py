"""Tables of measured rows beside what was predicted; no GPU is needed for them.

A share is of times that were measured in alternation.
"""

from pathlib import Path

from benchmarks.gpu import predictions
from benchmarks.gpu.hardware import Gpu, gpu
from benchmarks.gpu.plan import OURS
from benchmarks.gpu.rows import SAME, Row, Rows, read

Line = list[str]
# What a contestant without a label in its rows is called: the same as in the predictions' table.
IN_SHORT = (
    *("eager", "compile", "trl", "torch-lce", "flsce", "flsce-composed", "cce-exact", "verl"),
    *("triton-0.2", "triton-threshold", "triton-known", "torch-0.2"),
)


def run(rows: Rows, job: Row) -> None:
    """Writes table.md and, where tiles were timed, a proposal of tiles.py into the folder."""
    from benchmarks.gpu import tune

    out = Path(job["out"])
    text = "\n\n".join([in_short(rows), whole(rows)])
    (out / "table.md").write_text(text + "\n")
    rows.log(f"{text}\nwrote {out / 'table.md'}")
    rows.log(tune.propose(rows, out / "tiles.py") or "no tile was timed")


def runs(path: Path) -> list[Rows]:
    """The runs of a file: rows of one GPU, driver, versions and sources."""
    abouts = {repr([row["about"].get(key) for key in SAME]): row["about"] for row in read(path)[0]}
    return [Rows(path, about) for about in abouts.values()]


def in_short(rows: Rows) -> str:
    """What people compare: milliseconds of a step by shape, beside their predictions."""
    on = gpu(rows.about["gpu"])
    # At the whole vocabulary, where a contestant has both.
    found = sorted(rows.of("steps"), key=lambda row: row.get("vocabulary", 0))
    shapes = sorted({(row["tokens"], row["hidden"]) for row in found if "p50_ms" in row})
    lines = []
    for name in IN_SHORT:
        of_name = {(x["tokens"], x["hidden"]): x for x in found if x["name"] == name}
        if any("p50_ms" in x for x in of_name.values()):
            label = next(x.get("label", name) for x in of_name.values())
            lines.append([label, *(_beside(name, of_name.get(at), at, on) for at in shapes)])
    columns = [f"T={tokens:,} D={hidden:,}" for tokens, hidden in shapes]
    head = "Milliseconds of forward and backward, p50; in brackets what was predicted."
    return "\n\n".join([about(rows), head, _table(["", *columns], lines)])


def _beside(name: str, row: Row | None, at: tuple[int, int], on: Gpu | None) -> str:
    if row is None or "p50_ms" not in row:
        return "" if row is None else "failed"
    predicted = predictions.milliseconds(name, *at, on)
    return f"{row['p50_ms']:.3g}" + (f" ({predicted:.3g})" if predicted else "")


def whole(rows: Rows) -> str:
    """Every row."""
    shapes = {
        (x["tokens"], x["hidden"], x["vocabulary"]): None for x in rows.of("steps") if "tokens" in x
    }
    sections = [_small(rows), *(_steps(rows, *shape) for shape in shapes), _tiles(rows)]
    return "\n\n".join(section for section in [*sections, _tools(rows), _shards(rows)] if section)


def about(rows: Rows) -> str:
    """The conditions, and what correctness found."""
    given = rows.about
    versions = ", ".join(f"{name} {number}" for name, number in given["versions"].items())
    cases = rows.of("correctness")
    failed = [row["name"] for row in cases if "error" in row]
    left_out = sum("left_out" in row for row in cases)
    checked = f"correctness: {len(cases)} cases, {len(failed)} failed, {left_out} left out"
    checked += "".join(f"; FAILED {name}" for name in failed[:5])
    return (
        f"{given['gpu'] or 'no GPU'}, driver {given['driver']}; {versions}; commit "
        f"{given['commit']}, sources {given['source']}; {given['date']}; {checked}. "
        "Predictions are of a cost model, made before any measurement."
    )


def _small(rows: Rows) -> str:
    """Floors, threshold and graphs."""
    lines: list[Line] = []
    on = gpu(rows.about["gpu"])
    predicted = _number(predictions.copy_gb_per_s(on), "GB/s")
    for row in rows.of("environment", name="copy"):
        lines.append(["copy", "", _number(row.get("gb_per_s"), "GB/s"), predicted, ""])
    for row in rows.of("floors"):
        hidden = row["hidden"]
        wanted = predictions.forward_tflops(row["name"], hidden, on)
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


def _steps(rows: Rows, tokens: int, hidden: int, vocabulary: int) -> str:
    shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    found = {row["name"]: row for row in rows.of("steps", **shape)}
    lines, on = [], gpu(rows.about["gpu"])
    for name, row in found.items():
        lines.append(
            [
                row.get("label", name),
                f"{row['units']:.2g}" if "units" in row else "",
                _ms(row),
                _number(predictions.milliseconds(name, tokens, hidden, on), "ms"),
                f"{row['base_share']:.2f}" if "base_share" in row else "",
                _number(row.get("tflops"), ""),
                _gigabytes(row.get("peak_bytes")),
                _failure(row),
            ]
        )
    head = f"**T={tokens}, D={hidden}, V={vocabulary}**"
    columns = ["", "units", "p50 (p20-p80)", "predicted", f"{OURS} / it", "TF/s", "peak GB", ""]
    return "\n\n".join([head, _table(columns, lines), *_targets(rows, found)])


def _targets(rows: Rows, found: dict[str, Row]) -> list[str]:
    """The targets, and whether they are met."""
    times = {name: row["p50_ms"] for name, row in found.items() if "p50_ms" in row}
    said = []
    for ours, other, share in (*predictions.TARGETS, *predictions.VERL_TARGETS):
        if ours in times and other in times:
            got = times[ours] / times[other]
            said.append(f"{ours} / {other}: {got:.2f}, wanted {share:g}: {_verdict(got <= share)}")
    forward = found.get("triton-forward", {}).get("tflops")
    hidden = next(iter(found.values()))["hidden"]
    floors = rows.of("floors", name="logits, 16-bit out", hidden=hidden)
    if forward and floors and "tflops" in floors[0]:
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
    found = [row for row in rows.of("sweep") if "hidden" in row]
    found.sort(key=lambda row: (row["name"].split()[0], row["hidden"], row.get("p50_ms", 1e9)))
    for row in found:
        cells = [row["name"], f"D={row['hidden']}", _ms(row), _number(row.get("tflops"), "TF/s")]
        lines.append([*cells, _failure(row)])
    return _table(["tile", "at", "p50 (p20-p80)", "rate", ""], lines)


def _tools(rows: Rows) -> str:
    lines = []
    for row in rows.of("profile"):
        values = {k: v for k, v in row.items() if k not in ("stage", "name", "about", "error")}
        lines.append([row["name"], ", ".join(f"{k} {v}" for k, v in values.items()), _failure(row)])
    return _table(["tool", "found", ""], lines)


def _shards(rows: Rows) -> str:
    lines = [
        [x["name"], f"{x['seconds']:g}", f"{x['predicted_s']:.3g}", _failure(x)]
        for x in rows.of("run")
    ]
    return _table(["shard", "s", "predicted s", ""], lines)


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
