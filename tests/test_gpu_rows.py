"""Rows of anyone's GPU are checked before they are taken, and become tables beside predictions."""

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.gpu import table
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.schema import complaints

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu"
ABOUT = {
    "gpu": "NVIDIA H200",
    "architecture": "sm_90",
    "driver": "1.2",
    "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0"},
    "source": "a digest",
    "commit": "unknown",
    "date": "2026-11-29",
    "quick": False,
}
SHAPE = {"tokens": 8192, "hidden": 4096, "vocabulary": 151936}
TIMES = {"p50_ms": 2.0, "p20_ms": 1.4, "p80_ms": 2.6, "samples_ms": [1.0, 2.0, 3.0]}
STEP = {**SHAPE, **TIMES, "label": "a step", "error_of_norm": 0.0, "peak_bytes": 9, "units": 1.6}
TILE = ["tma", 128, 256, 64, 8, 3, 16, 2048]


@pytest.fixture
def path(tmp_path):
    """A run as it is written, of numbers that nobody measured."""
    rows = Rows(tmp_path / "rows.jsonl", ABOUT)
    rows.add("environment", "copy", gb_per_s=4000.0, **TIMES)
    rows.add("floors", "logits, 16-bit out", **SHAPE, **TIMES, tflops=700.0, units=1.0)
    rows.add("correctness", "a case", kernels=["forward tma bfloat16"], passed=True, seed=3)
    rows.add("correctness", "another", kernels=["dlogits tma bfloat16"], error="hung")
    rows.add("correctness", "2^31", kernels=["dlogits tma bfloat16"], left_out="wants 3e10 bytes")
    rows.add("steps", "triton-0.2", **STEP)
    rows.add("steps", "eager", **STEP | {"label": "eager"})
    rows.add("steps", "triton-0.2", **STEP, alternated="base 8192x4096", base_share=1.0)
    rows.add("steps", "flsce", **SHAPE, error="ImportError: no cutlass")
    rows.add("steps", "alternation base 8192x4096", entries=2, rounds=3)
    rows.add("threshold", "entropy_threshold, triton", entropies=9, gb_per_s=9.0, **TIMES)
    rows.add("graphs", "triton-0.2", **SHAPE, **TIMES, call_ms=3.0, replays=True)
    rows.add(
        *("sweep", "forward tma"), **SHAPE, **TIMES, op="forward", tile=TILE, error_of_norm=1e-6
    )
    rows.add("profile", "ncu forward", Duration="3 ms")
    rows.add("run", "floors", seconds=9.0, predicted_s=12)
    return rows.path


def test_real_file_is_taken(path, capsys):
    assert complaints(path) == []
    assert main(["--check", str(path)]) == 0
    assert "15 rows\nfit for benchmarks/results/gpu/" in capsys.readouterr().out


def test_files_of_others_are_fit():
    for found in RESULTS.glob("*.jsonl"):
        assert complaints(found) == [], found


def remove(key):
    return lambda row: row.pop(key)


def put(**values):
    return lambda row: row.update(values)


def about(**values):
    return lambda row: row["about"].update(values)


@pytest.mark.parametrize(
    ("line", "damage", "said"),
    [
        (6, remove("stage"), "line 6: stage: got nothing; wanted it"),
        (6, put(stage="speed"), 'line 6: stage: got "speed"; wanted one of environment, floors'),
        (6, put(p50_ms="fast"), 'line 6: p50_ms: got "fast"; wanted a number above 0'),
        (6, put(p50_ms=-1.0), "line 6: p50_ms: got -1.0; wanted a number above 0"),
        (6, put(p50_ms=float("nan")), "line 6: p50_ms: got NaN; wanted a number above 0"),
        (6, put(p50_ms=1.0), "line 6: p50_ms: got 1; wanted 2, by its samples"),
        (6, put(samples_ms=[]), "line 6: samples_ms: got []; wanted a list of numbers above 0"),
        (6, put(tokens=8192.0), "line 6: tokens: got 8192.0; wanted a whole number above 0"),
        (6, remove("peak_bytes"), "line 6: peak_bytes: got nothing; wanted a number of at least 0"),
        (2, remove("samples_ms"), "line 2: samples_ms: got nothing; wanted a list of numbers"),
        (3, remove("passed"), "line 3: passed: got nothing; wanted true"),
        (3, put(passed=False), "line 3: passed: got false; wanted true"),
        (6, put(error_of_norm=0.9), "line 6: error_of_norm: got 0.9; wanted 0.25 at most"),
        (13, put(error_of_norm=0.02), "line 13: error_of_norm: got 0.02; wanted 0.01 at most"),
        (13, remove("tile"), "line 13: tile: got nothing; wanted it"),
        (7, put(name="triton-0.2"), "line 7: got 'triton-0.2' again; wanted it once, line 6"),
        (7, about(gpu="A100"), 'line 7: about.gpu: got "A100"; wanted "NVIDIA H200", as before'),
        (7, about(gpu=None), "line 7: about.gpu: got null; wanted a text"),
        (7, about(quick=True), "line 7: about.quick: got true; wanted false"),
        (7, about(date="29.11.26"), 'line 7: about.date: got "29.11.26"; wanted a date as 2026'),
        (7, about(date="2026-13-40"), 'line 7: about.date: got "2026-13-40"; wanted a date as'),
        (7, put(name=5), "line 7: name: got 5; wanted a text"),
        (7, put(stage=["steps"]), 'line 7: stage: got ["steps"]; wanted one of'),
        (7, about(versions={}), "line 7: about.versions: got {}; wanted an object with torch"),
        (7, put(about=3), "line 7: about: got 3; wanted an object"),
    ],
)
def test_each_damage_is_named_by_line_with_what_came_and_what_was_wanted(path, line, damage, said):
    lines = path.read_text().splitlines()
    row = json.loads(lines[line - 1])
    damage(row)
    path.write_text("\n".join([*lines[: line - 1], json.dumps(row), *lines[line:]]) + "\n")
    found = complaints(path)
    assert found[0].startswith(said)
    assert len(found) == 1


def test_torn_line_empty_file_and_none_at_all_are_refused(path, tmp_path, capsys):
    path.write_bytes(path.read_bytes()[:-40])
    (torn,) = complaints(path)
    assert torn.startswith('line 15: got {"stage": "run"')
    assert torn.endswith("; wanted JSON")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert complaints(empty) == ["got no timed row; wanted times of floors or steps"]
    lines = [line for line in path.read_text().splitlines()[:14] if '"passed"' not in line]
    empty.write_text("\n".join(lines))
    assert complaints(empty) == [
        "got no case of correctness that passed; wanted those of what was timed"
    ]
    assert complaints(tmp_path / "x.jsonl") == ["no such file"]
    empty.write_text("[3]\n")
    assert complaints(empty)[0] == "line 1: got [3]; wanted an object"
    assert main(["--check", str(empty), str(path)]) == 1
    assert f"{empty}: line 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--tables", "nowhere.jsonl"],
            "files of measured rows; got nowhere.jsonl, which has none",
        ),
        (["--quick", "--seconds", "-3"], "--seconds must be above 0; got -3"),
        (["--quick", "--seconds", "nan"], "--seconds must be above 0; got nan"),
    ],
)
def test_arguments_that_measure_nothing_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_tables_need_no_gpu_and_set_predictions_beside_rows(path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--tables", str(path)]) == 0
    said = capsys.readouterr().out
    (rows,) = table.runs(path)
    assert table.in_short(rows) in said
    assert "NVIDIA H200, driver 1.2; python 3.12.3, torch 2.11.0" in said
    assert "3 cases, 1 failed, 1 left out; FAILED another" in said
    assert "|  | T=8,192 D=4,096 |" in said
    (line,) = (x for x in table.in_short(rows).splitlines() if x.startswith("| eager"))
    assert line.startswith("| eager | 2 (")
    assert "| flsce |  |  |" in said
    assert "ImportError: no cutlass" in said
    assert "| floors | 9 | 12 |  |" in said


def test_report_has_the_table_of_every_gpu_that_was_measured(path, tmp_path):
    folder = tmp_path / "results" / "gpu"
    folder.mkdir(parents=True)
    assert report.measured(folder.parent) == []
    path.rename(folder / "nvidia-h200-2026-11-29.jsonl")
    (rows,) = table.runs(folder / "nvidia-h200-2026-11-29.jsonl")
    assert report.measured(folder.parent) == [table.in_short(rows)]
