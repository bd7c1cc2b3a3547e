"""The GPU benchmarks refuse what is wrong, go on where they stopped, and every stage runs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import benchmarks.gpu  # noqa: F401
from benchmarks.gpu import correctness, one_launch, predictions, steps, tune
from benchmarks.gpu.__main__ import STAGES, main
from benchmarks.gpu.contestant import Contestant, relative_error
from benchmarks.gpu.problem import make_problem
from benchmarks.gpu.rows import Rows, limited
from benchmarks.gpu.setting import quick_setting
from entropy_kernels._triton.common import tiles
from entropy_kernels._triton.common.tiles import ANY, Key, Tile

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ABOUT = {"gpu": None, "driver": None, "versions": {}, "source": "s", "quick": True}


def _quiet(line: str) -> None:
    pass


@pytest.fixture
def rows(tmp_path) -> Rows:
    return Rows(tmp_path / "rows.jsonl", ABOUT, _quiet)


def _run(out: Path, *stages: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", *stages, "--quick", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_every_stage_runs_and_a_second_run_measures_nothing_again(tmp_path):
    done = _run(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert {row["stage"] for row in found} == set(STAGES) - {"tune", "table"}
    record = json.loads(next(tmp_path.glob("correctness-interpreter-*.json")).read_text())
    assert record["failed"] == []
    assert record["passed"]
    for row in found:
        if row["name"].startswith(("triton", "torch", "eager")) and row["stage"] == "peers":
            assert row["p50_ms"] > 0, row
    compile((tmp_path / "tiles.py").read_text(), "tiles.py", "exec")
    table = (tmp_path / "table.md").read_text()
    assert "torch.compile of the same" in table
    assert "0 failed" in table
    again = _run(tmp_path, "environment", "floors", "peers", "threshold")
    assert again.returncode == 0
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines


def test_without_a_gpu_only_quick_runs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["environment"])
    assert "--quick" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["warp", "--quick"])
    assert "no stage warp" in capsys.readouterr().err


def test_package_imports_where_jaxtyping_is_missing():
    code = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "import benchmarks.gpu, torch, entropy_kernels as ek\n"
        "print(ek.entropy_threshold(torch.tensor([1.0, 2.0, 3.0]), fraction=0.5))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "tensor(2.)", done.stderr[-2000:]


def test_rows_of_another_run_count_as_not_there(rows):
    rows.add("stage", "it", tokens=1, p50_ms=2.0)
    assert Rows(rows.path, ABOUT, _quiet).has("stage", "it", tokens=1)
    assert not Rows(rows.path, ABOUT, _quiet).has("stage", "it", tokens=2)
    for change in ({"gpu": "H200"}, {"source": "t"}, {"versions": {"torch": "2"}}):
        assert not Rows(rows.path, ABOUT | change, _quiet).has("stage", "it", tokens=1)


def test_failures_are_rows_and_a_lost_gpu_ends_the_run(rows):
    def fail(message: str) -> dict:
        raise RuntimeError(message)

    assert "out of memory" in rows.measure("s", "a", lambda: fail("out of\nmemory"))["error"]
    assert rows.measure("s", "a", lambda: {"p50_ms": 1.0}).get("p50_ms") is None
    with pytest.raises(RuntimeError, match="illegal"):
        rows.measure("s", "b", lambda: fail("an illegal memory access was encountered"))
    assert rows.has("s", "b")


def test_a_stage_stops_at_its_limit_and_keeps_what_it_has(rows):
    def last_minute() -> dict:
        assert 0 < signal.setitimer(signal.ITIMER_REAL, 0.01)[0] <= 600
        time.sleep(30)
        return {}

    def work() -> None:
        rows.measure("s", "first", dict)
        rows.measure("s", "second", last_minute)

    assert not limited(600, work)
    assert rows.has("s", "first")
    assert not rows.has("s", "second")
    assert limited(600, lambda: None)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_wrong_contestant_is_refused_and_never_timed(rows, tmp_path):
    calls = []

    def wrong(problem):
        calls.append(0)
        return {"logprob": problem.truth["logprob"] * 1.01}

    contestants = [
        Contestant("wrong", "wrong", wrong, 1.0),
        Contestant("nan", "nan", lambda p: {"entropy": p.truth["entropy"] * torch.nan}, 1.0),
        Contestant("right", "right", lambda p: {"entropy": p.truth["entropy"]}, 1.0),
        Contestant("triton-x", "unchecked", lambda p: {"entropy": p.truth["entropy"]}, 1.0),
    ]
    setting = quick_setting(rows, CPU, tmp_path)
    steps.measure(setting, "peers", 16, 8, 61, contestants)
    found = {row["name"]: row for row in rows.of("peers")}
    assert len(calls) == 1
    assert "logprob is off by 0.01" in found["wrong"]["refused"]
    assert "entropy is off by nan" in found["nan"]["refused"]
    assert found["right"]["p50_ms"] > 0
    assert "no complete correctness run" in found["triton-x"]["refused"]
    rows.add(correctness.STAGE, correctness.SUMMARY, count=2, failed=["a case"])
    assert "a case" in correctness.refusal(rows)


def test_truth_is_that_of_the_definition():
    problem = make_problem(24, 16, 97, torch.float32, CPU, seed=3)
    h, w = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    logp = (h @ w.T).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    kept = torch.zeros(24, dtype=torch.bool)
    kept[entropy.topk(5).indices] = True
    assert torch.equal(problem.selected, kept)
    assert entropy[~kept].max() < problem.threshold < entropy[kept].min()
    ratio = (logp[torch.arange(24), problem.target] - problem.old_logprob).exp()
    gain = torch.minimum(ratio * problem.advantage, ratio.clamp(0.8, 1.28) * problem.advantage)
    loss = -(gain * kept).sum() / 5
    loss.backward()
    wanted = {"loss": loss.detach(), "entropy": entropy.detach(), "dhidden": h.grad}
    for name, x in (wanted | {"dweight": w.grad}).items():
        assert relative_error(problem.truth[name], x) < 1e-6, name


def test_tuner_writes_the_table_as_it_stands_in_the_file(tmp_path):
    path = tmp_path / "tiles.py"
    tune.write(tiles.TILES, tune.PATH, path)
    assert path.read_text() == tune.PATH.read_text()


def test_tuner_keeps_the_fastest_of_each_variant_and_what_was_not_measured():
    def row(op: str, hidden: int, tile: Tile, p50: float) -> dict:
        return {"op": op, "hidden": hidden, "tile": list(tile[:8]), "p50_ms": p50}

    slow, fast = Tile("tma", 128, 256, 64, 8, 3), Tile("tma", 128, 128, 64, 8, 4)
    plain = Tile("pointer", 128, 128, 64, 8, 3)
    measured = tune.best(
        [
            row("forward", 1024, slow, 3.0),
            row("forward", 1024, fast, 2.0),
            row("forward", 4096, slow, 7.0),
            row("forward", 4096, plain, 6.0),
        ],
        "sm_90",
        "bfloat16",
        "a GPU, a date",
    )
    small, large = (Key("forward", "sm_90", "bfloat16", x, ANY) for x in (1024, ANY))
    assert measured[small] == (fast._replace(source="a GPU, a date"),)
    assert [tile.variant for tile in measured[large]] == ["pointer", "tma"]
    table = tune.merged(tiles.TILES, measured)
    assert table[small][0].source == "a GPU, a date"
    assert "cublas" in {tile.variant for tile in table[large]}
    others = {key: x for key, x in tiles.TILES.items() if key[:3] != small[:3]}
    assert {key: x for key, x in table.items() if key[:3] != small[:3]} == others


def test_predictions_scale_with_the_tokens_and_say_nothing_of_other_shapes():
    assert predictions.milliseconds("triton-0.2", 8192, 4096) == 26.0
    assert predictions.milliseconds("triton-0.2", 32768, 4096) == 101.7
    assert predictions.milliseconds("triton-threshold", 8192, 4096) == 21.3
    assert predictions.milliseconds("cce-exact", 32768, 1024) == 120
    assert predictions.milliseconds("eager", 8192, 333) is None
    forward = predictions.milliseconds("triton-forward", 8192, 4096)
    assert forward == pytest.approx(16.4, rel=0.01)


@pytest.mark.parametrize("name", ["stored_rows", "selection", "ratio_loss"])
def test_one_launch_for_tools_that_watch_a_process(name):
    one_launch.main(name, "small", "cpu")
