"""Turns benchmarks/results/*.json into the tables and the plots that people read.

python -m benchmarks.report          rewrites README.md and docs/benchmarks.md between markers,
                                     benchmarks/results/README.md and the plots in docs/
python -m benchmarks.report --check  fails where they are not what the result files say

A ratio is taken within a round, against the first contestant's time in the same round; p50 and
p20-p80 are over the rounds. What has no result file has no section.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import cost_tables as cost
from benchmarks import head_tables as head
from benchmarks import sampler_runs, trl_trainers
from benchmarks import step_tables as step
from benchmarks.engine_runs import panels as run_panels
from benchmarks.gpu.table import in_short
from benchmarks.gpu.table import runs as gpu_runs
from benchmarks.predicted_tables import predicted
from benchmarks.real_model import tables as real_model
from benchmarks.sampler_tables import sampler_step_tables
from benchmarks.tables import Run, by_make, by_shape, make_heading, processor_of
from trainer.report.charts import figure

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
FIGURE = "![CPU time of a step against eager, by fraction of tokens](benchmarks.svg)"
COST_FIGURE = "![Time of a step against tokens, vocabulary and fraction of tokens](linear_cost.svg)"
POINTER = (
    "[benchmarks/results](../benchmarks/results/README.md) has every contestant, shape and "
    "benchmark, with seconds and errors."
)
FULL_PAGE = (
    "# All results\n\n"
    "Written by `python -m benchmarks.report` from the files beside it. Times are p50 (p20-p80) "
    "over rounds in which all contestants alternate. MB is the peak of resident memory above the "
    "inputs, results included, in a fresh process. A unit is one product of T x D x V. Error is "
    "the largest of any result against fp64, relative to its norm."
)


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
    runs = read(root / "benchmarks" / "results")
    shapes = by_shape(runs["linear_logprob_entropy"])
    of_gpus = measured(root / RESULTS)
    trained = [*trl_trainers.of(root / RESULTS), *sampler_runs.of(root / RESULTS)]
    trained += real_model.of(root / RESULTS)
    blocks = {
        root / "README.md": "\n\n".join(
            [_in_short(runs), *real_model.in_short(root / RESULTS), *of_gpus]
        ),
        root / "docs" / "benchmarks.md": "\n\n".join(
            [_summary(runs), *trained, *(of_gpus or [predicted()])]
        ),
    }
    texts = {path: between_markers(path, block) for path, block in blocks.items()} | {
        root / "benchmarks" / "results" / "README.md": _full_page(runs),
        root / "docs" / "benchmarks.svg": figure([head.panel(run) for run in shapes[0]], RESULTS),
    }
    if "linear_cost" in runs:
        makes = [
            of_make["linear_cost"] for of_make in by_make({"linear_cost": runs["linear_cost"]})
        ]
        panels = [panel for of_make in makes for panel in cost.cost_panels(of_make)]
        texts[root / "docs" / "linear_cost.svg"] = figure(panels, RESULTS, len(cost.SWEEPS))
    runs_of_engines = root / "benchmarks" / "results" / "engine_runs.json"
    if runs_of_engines.exists():
        panels = run_panels(json.loads(runs_of_engines.read_text()))
        texts[root / "docs" / "engine_runs.svg"] = figure(panels, RESULTS)
    return texts


def read(folder: Path) -> dict[str, list[Run]]:
    """Runs by op; a contestant that was refused has a reason and no times."""
    found: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*-cpu-*.json")):
        run = json.loads(path.read_text())
        found.setdefault(run["op"], []).append(run)
    if "linear_logprob_entropy" not in found:
        raise SystemExit(f"no result files of the head in {folder}; make bench writes them")
    return found


def between_markers(path: Path, block: str, name: str = "benchmarks") -> str:
    """The file's text with `block` between its markers of `name`."""
    text = path.read_text()
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{path.name} needs one line {begin} and, after it, one line {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{block}\n{end}{after}"


def _in_short(runs: dict[str, list[Run]]) -> str:
    """What README.md has: the head against eager, on the make that was measured last."""
    (of_make, *_) = by_make({"linear_logprob_entropy": runs["linear_logprob_entropy"]})
    table = head.in_short(of_make["linear_logprob_entropy"], [])
    return f"{make_heading(of_make)}\n\n{table}"


def _summary(runs: dict[str, list[Run]]) -> str:
    """What docs/benchmarks.md has: the numbers in short, one shape's contestants, the plots."""
    parts = []
    for of_make in by_make(runs):
        parts += [make_heading(of_make), *_summary_of_make(of_make)]
    figures = {"linear_logprob_entropy": FIGURE, "linear_cost": COST_FIGURE}
    parts += [figure for op, figure in figures.items() if op in runs]
    return "\n\n".join([*parts, POINTER])


def measured(results: Path) -> list[str]:
    """The table of every GPU that was measured, the newest file first."""
    files = sorted((results / "gpu").glob("*.jsonl"), reverse=True)
    return [in_short(rows) for path in files for rows in gpu_runs(path)]


def _summary_of_make(runs: dict[str, list[Run]]) -> list[str]:
    parts = []
    if "linear_logprob_entropy" in runs:
        of_head = runs["linear_logprob_entropy"]
        parts.append(head.in_short(of_head, runs.get("head_floor", [])))
        parts.append(head.section(by_shape(of_head)[0], head.compact))
        parts += filter(None, [head.computes_table(by_shape(of_head)[0])])
    tables = {
        "linear_cost": cost.cost_in_short,
        "entropy_threshold": step.threshold_in_short,
        "ratio_loss": step.ratio_loss_in_short,
        "train_step": step.train_step_tables,
        "sampler_step": sampler_step_tables,
    }
    return parts + [make(runs[op]) for op, make in tables.items() if op in runs]


def _full_page(runs: dict[str, list[Run]]) -> str:
    tables = {
        "linear_logprob_entropy": _all_shapes,
        "head_floor": head.floor_tables,
        "linear_cost": cost.cost_tables,
        "entropy_threshold": step.threshold_tables,
        "ratio_loss": step.ratio_loss_tables,
        "trl_step": step.trl_step_tables,
        "train_step": step.train_step_tables,
        "sampler_step": sampler_step_tables,
    }
    parts = [FULL_PAGE]
    for of_make in by_make(runs):
        parts += [f"## {processor_of(next(iter(of_make.values()))[0]).make}", make_heading(of_make)]
        parts += [make(of_make[op]) for op, make in tables.items() if op in of_make]
    return "\n\n".join(parts) + "\n"


def _all_shapes(runs: list[Run]) -> str:
    sections = [head.section(shape, head.full) for shape in by_shape(runs)]
    return "\n\n".join([*sections, *filter(None, [head.computes_table(runs)])])


if __name__ == "__main__":
    sys.exit(main())
