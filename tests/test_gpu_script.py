"""The GPU benchmarks refuse what is wrong, and set their tables beside the predictions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import contest, correctness, one_launch, steps, tune
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.contest import Entry
from benchmarks.gpu.contestant import Contestant, relative_error
from benchmarks.gpu.problem import make_problem
from benchmarks.gpu.rows import LostError, OutOfTimeError, Rows
from benchmarks.gpu.setting import Setting
from entropy_kernels import backends
from entropy_kernels._bench import others
from entropy_kernels._triton.common import tiles
from entropy_kernels._triton.common.tiles import ANY, Key, Tile
from entropy_kernels.verification import head_runs
from tests import cuda_extension

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ABOUT = {"gpu": None, "driver": None, "versions": {}, "source": "s", "quick": True}


@pytest.fixture
def rows(tmp_path) -> Rows:
    return Rows(tmp_path / "rows.jsonl", ABOUT)


def test_without_a_gpu_only_quick_runs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["environment"])
    assert "--quick" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["warp", "--quick"])
    assert "no stage warp" in capsys.readouterr().err


def test_package_and_script_import_where_other_modules_are_missing():
    """A borrowed machine has torch and Triton: no git, no test tools, no compiled module."""
    code = (
        "import sys\n"
        "for name in ('jaxtyping', 'pytest', 'hypothesis', 'entropy_kernels._cpu'):\n"
        "    sys.modules[name] = None\n"
        "import os; os.environ['PATH'] = ''\n"
        "import benchmarks.gpu.__main__, benchmarks.gpu.tools, benchmarks.gpu.table\n"
        "import benchmarks.gpu.first_use, benchmarks.gpu.floors, benchmarks.gpu.schema\n"
        "from benchmarks.gpu.__main__ import IMPORTS\n"
        "import importlib; [importlib.import_module(x) for x in IMPORTS]\n"
        "import torch, entropy_kernels as ek\n"
        "from benchmarks.gpu import environment\n"
        "assert environment.about(torch.device('cpu'), True, None)['commit'] == 'unknown'\n"
        "print(ek.entropy_threshold(torch.tensor([1.0, 2.0, 3.0]), fraction=0.5))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "tensor(2.)", done.stderr[-2000:]


def test_rows_of_another_run_count_as_not_there(rows):
    rows.add("stage", "it", tokens=1, p50_ms=2.0)
    assert Rows(rows.path, ABOUT).has("stage", "it", tokens=1)
    assert not Rows(rows.path, ABOUT).has("stage", "it", tokens=2)
    for change in ({"gpu": "H200"}, {"source": "t"}, {"versions": {"torch": "2"}}):
        assert not Rows(rows.path, ABOUT | change).has("stage", "it", tokens=1)


def test_failures_are_rows_and_a_lost_gpu_ends_the_process(rows):
    def fail(message: str) -> dict:
        raise RuntimeError(message)

    assert "out of memory" in rows.measure("s", "a", lambda: fail("out of\nmemory"))["error"]
    assert rows.measure("s", "a", lambda: {"p50_ms": 1.0}).get("p50_ms") is None
    with pytest.raises(LostError, match="illegal"):
        rows.measure("s", "b", lambda: fail("an illegal memory access was encountered"))
    assert rows.has("s", "b")
    rows.until = 0.0
    with pytest.raises(OutOfTimeError):
        rows.measure("s", "c", dict)
    assert rows.measure("s", "b", dict)["error"]


def test_wrong_contestant_is_refused_and_never_timed(rows):
    calls = []

    def wrong(problem):
        calls.append(0)
        return {"logprob": problem.truth["logprob"] * 1.01}

    contestants = [
        Contestant("wrong", "wrong", wrong, 1.0),
        Contestant("nan", "nan", lambda p: {"entropy": p.truth["entropy"] * torch.nan}, 1.0),
        Contestant("right", "right", lambda p: {"entropy": p.truth["entropy"]}, 1.0),
    ]
    steps.measure(Setting(rows, CPU, quick=True), "base", 16, 8, 61, contestants)
    found = {row["name"]: row for row in rows.of("steps")}
    assert len(calls) == 1
    assert "logprob is off by 0.01" in found["wrong"]["error"]
    assert "entropy is off by nan" in found["nan"]["error"]
    assert found["right"]["p50_ms"] > 0
    assert found["right"]["alternated"] == "base 16x8"


def test_failed_kernel_is_not_timed_and_every_other_one_is(rows):
    rows.add("correctness", "a case", kernels=["forward tma bfloat16"], error="off")
    rows.add("correctness", "another", kernels=["forward pointer bfloat16"], passed=True)
    entries = [
        Entry("x", dict, int, ("forward tma bfloat16", "dlogits tma bfloat16")),
        *(Entry(x, dict, int, (f"forward {x}",)) for x in ("tma float32", "pointer bfloat16")),
        Entry("untested", dict, int, ("dlogits tma bfloat16",)),
        Entry("eager", dict, int),
    ]
    contest.hold(Setting(rows, CPU, quick=True), "sweep", "group", entries, {"hidden": 8})
    found = {row["name"]: row for row in rows.of("sweep")}
    refused = found.pop("x")["refused"]
    assert refused == "forward tma bfloat16 failed correctness: a case"
    assert found.pop("alternation group")["entries"] == 4
    assert all("p50_ms" in row for row in found.values())
    assert len(found) == 4


@pytest.mark.parametrize(
    ("wrong", "shape", "blamed"),
    [
        ("forward", "a tile", "forward tma float32"),
        ("dlogits", "a tile", "dlogits tma float32"),
        ("compiler", "a tile", "dlogits tma float32"),
        # Its rows of 37 words fit no descriptor, so that another tile runs.
        ("forward", "prime", "forward pointer float32"),
    ],
)
def test_failed_case_blames_the_kernel_that_ran_and_was_wrong(
    rows, monkeypatch, wrong, shape, blamed
):
    group = next(x for x in correctness.groups("interpreter", True) if x.name.startswith("tma "))
    case = next(x for x in correctness.cases(group, CPU, True) if x.name.endswith(f": {shape}"))
    launch = f"launch_{'forward' if wrong == 'forward' else 'backward'}"
    right = getattr(head_runs, launch)

    def broken(*arguments):
        found = right(*arguments)
        if wrong == "compiler":
            raise RuntimeError("out of resource: shared memory")
        (found.logprob if wrong == "forward" else found[0])[0] += 1
        return found

    monkeypatch.setattr(head_runs, launch, broken)
    correctness.run_case(rows, CPU, case, ["forward tma float32", "dlogits tma float32"], 0)
    (row,) = rows.of("correctness")
    assert row["kernels"] == [blamed]
    assert correctness.refusal(rows, [blamed, "x"]) == f"{blamed} failed correctness: {case.name}"
    assert correctness.refusal(rows, ["x"]) == ""


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
        return {"op": op, "hidden": hidden, "tile": list(tile[:-1]), "p50_ms": p50}

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
    merged = tune.merged(tiles.TILES, measured)
    assert merged[small][0].source == "a GPU, a date"
    assert "cublas" in {tile.variant for tile in merged[large]}
    others = {key: x for key, x in tiles.TILES.items() if key[:3] != small[:3]}
    assert {key: x for key, x in merged.items() if key[:3] != small[:3]} == others


def test_chunk_of_trl_is_its_own():
    utils = pytest.importorskip("trl.trainer.utils")
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == others.TRL_CHUNK


@pytest.mark.parametrize("name", ["stored_rows", "selection", "ratio_loss"])
def test_one_launch_for_tools_that_watch_a_process(name):
    one_launch.main(name, "small", "cpu")


def test_csrc_is_checked_and_timed_after_the_others(rows, monkeypatch):
    cuda_extension.install(monkeypatch, cuda_extension.Extension())
    monkeypatch.setattr(backends, "available", lambda: ("torch", "cpu", "triton", "cuda"))
    monkeypatch.setattr(tiles.device, "has_warp_specialization", lambda arch: True)
    groups = [*correctness.groups("sm_90", quick=False)]
    assert [group.name.split()[0] for group in groups][-4:] == [
        *("cutlass", "cutlass", "tokens", "tma_ws")
    ]
    found = {(group.forward, group.dlogits) for group in groups if "cutlass" in group.name}
    assert found == {
        2 * (Tile("cutlass", 128, *columns_and_stages),)
        for columns_and_stages in ((128, 64, 12, 7), (256, 64, 12, 4))
    }
    held = []
    monkeypatch.setattr(steps, "measure", lambda *given: held.extend(given[-1]))
    job = {"group": "base", "tokens": 8, "hidden": 16, "vocabulary": 32, "quick": True}
    steps.run(rows, job)
    names = [one.name for one in held]
    ours_last = [name for name in names if name.startswith("cuda-")]
    assert names[-len(ours_last) :] == ours_last
    assert ours_last == [f"cuda-{way}" for way in ("0.2", "threshold", "known", "forward")]
