"""A run of the GPU's measurements loses what fails, and nothing else; it keeps its seconds."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import conductor, plan
from benchmarks.gpu.conductor import Conductor
from benchmarks.gpu.plan import SECONDS, STAGES, Shard
from benchmarks.gpu.rows import Row, Rows, append, identity, read
from benchmarks.gpu.schema import complaints
from tests.gpu_shards import ABOUT, WORK

ROOT = Path(__file__).parents[1]


@pytest.fixture
def conduct(tmp_path, monkeypatch):
    """Runs shards of tests.gpu_shards, given as {name: what it does}, and gives its rows."""
    # With it a worker imports torch.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(conductor, "RESERVE", 0.1)
    monkeypatch.setattr(conductor, "GRACE", 0.3)
    monkeypatch.setattr(conductor, "LEAST", 0.1)

    def run(shards, *, seconds=30.0, hang=1.5, stage="floors", predicted=1.0, work=WORK):
        path = tmp_path / "rows.jsonl"
        plan = [
            Shard(name if name == "table" else stage, name, work, predicted, arguments)
            for name, does in shards.items()
            for arguments in [{"shard": name, "does": does}]
        ]
        job = {"out": str(tmp_path), "about": ABOUT}
        end = time.monotonic() + seconds
        left_out = Conductor(Rows(path, ABOUT), plan, end, job, 2, 0, hang=hang).run()
        assert time.monotonic() <= end
        return read(path)[0], left_out

    return run


def by_name(rows):
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("crash", "died by SIGSEGV: a reason"),
        ("lost", "RuntimeError: an illegal memory access was encountered"),
        ("hang", "hung: killed after"),
        ("fail", "ValueError: out of memory"),
    ],
)
@pytest.mark.parametrize("stage", ["floors", "correctness"])
def test_trouble_costs_its_measurement_alone(conduct, trouble, why, stage):
    shards = {"a": f"ok {trouble} ok", "b": "ok ok"}
    rows, left_out = conduct(shards, stage=stage)
    found = by_name(rows)
    assert found[f"a 1 {trouble}"]["error"].startswith(why)
    assert found[f"a 1 {trouble}"]["kernels"] == ["op 1"]
    for name in ("a 0 ok", "a 2 ok", "b 0 ok", "b 1 ok"):
        assert found[name]["p50_ms"] == 1.0
    assert {name for name, row in found.items() if row["stage"] == "run"} == {"a", "b"}
    assert left_out == []
    assert conduct(shards, stage=stage)[0] == rows


def test_shard_that_dies_before_it_measures_is_not_tried_again(conduct):
    shards = {"a": "ok", "b": "ok"}
    found = by_name(conduct(shards, work="tests.gpu_shards:nothing")[0])
    assert list(found) == ["a", "b"]
    assert all(row["error"].startswith("exit status 1: AttributeError") for row in found.values())
    assert by_name(conduct(shards)[0]) == found


@pytest.mark.parametrize(("work", "status"), [(WORK, 0), ("tests.gpu_shards:nothing", 1)])
def test_exit_status_says_whether_a_shard_has_died(monkeypatch, tmp_path, capsys, work, status):
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    shard = Shard("floors", "a", work, 1.0, {"shard": "a", "does": "ok"})
    plan = {"shards": [asdict(shard)], "processes": 1, "memory": 0, "about": ABOUT}
    monkeypatch.setattr(program, "ask", lambda *_: plan)
    monkeypatch.setattr(program, "IMPORTS", ())
    assert program.main(["--quick", "--out", str(tmp_path)]) == status
    assert ("died before their end: a;" in capsys.readouterr().out) == bool(status)


def test_shards_that_are_late_leave_the_later_ones_their_share(conduct):
    slow = " ".join(["slow0.5"] * 8)
    shards = {"a": slow, "b": slow, "c": slow, "table": "ok"}
    rows, left_out = conduct(shards, seconds=9.0, predicted=4.0)
    counts = Counter(row["name"].split()[0] for row in rows)
    assert left_out == ["a", "b", "c"]
    assert counts["a"] >= 1
    assert counts["b"] >= 1
    assert counts["c"] == 0
    assert counts["table"] == 1
    more, left_out = conduct(shards, predicted=6.0)
    assert left_out == []
    assert len(by_name(more)) == 3 * 8 + 3 + 1
    assert more[: len(rows)] == rows


def running(process):
    """Whether the process of a folder of /proc has not ended."""
    try:
        return ") Z " not in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_late_shard_that_hangs_is_killed_with_its_children(conduct, tmp_path):
    rows, left_out = conduct({"a": "ok hang"}, seconds=10.0, hang=60.0)
    assert left_out == ["a"]
    assert list(by_name(rows)) == ["a 0 ok"]
    child = Path("/proc", (tmp_path / "child").read_text())
    deadline = time.monotonic() + 100
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running(child)


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, {"stage": "s", "name": "a", "about": ABOUT})
    for torn in (b'{"stage": "s", "na', b'{"stage": "s", "name": "x"}', b"3"):
        with path.open("ab") as file:
            file.write(torn)
        append(path, {"stage": "s", "name": "b", "about": ABOUT})
    rows, lost = read(path)
    assert [row["name"] for row in rows] == ["a", "b", "b", "b"]
    assert lost == [2, 4, 6]


def test_plan_fits_its_seconds_and_tma_ws_comes_last(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu.setting import Sizes
    from entropy_kernels import device

    # Triton 3.6 alone has it.
    monkeypatch.setattr(device, "has_warp_specialization", lambda arch: True)

    found = plan.shards("sm_90", Sizes(), quick=False, processes=14)
    assert len({shard.name for shard in found}) == len(found)
    assert list(dict.fromkeys(shard.stage for shard in found)) == [
        *(stage for stage in STAGES if stage not in (plan.TABLE, plan.PROFILE)),
        plan.PROFILE,
        plan.TABLE,
    ]
    wall = sum(
        shard.seconds / (14 if shard.stage in plan.ALONGSIDE else 1)
        for shard in found
        if shard.stage != plan.PROFILE
    )
    assert wall == pytest.approx(sum(SECONDS.values()) - SECONDS[plan.PROFILE])
    assert wall <= 450
    names = [shard.name for shard in found if shard.stage == "correctness"]
    assert all("tma_ws" in name for name in names[-plan.PARTS :])
    assert not any("tma_ws" in name for name in names[: -plan.PARTS])
    assert names[0] == "first use, D=4096"
    assert names[3].startswith("correctness the table's + the table's bfloat16, 1 of")


def start(*command: str | Path) -> "subprocess.Popen[bytes]":
    command = (sys.executable, "-m", *command)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the whole tree at once."""
    tree, parents = {process.pid}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def complaints_of_a_gpu(rows, folder: Path) -> list[str]:
    """What --check says of these rows, had a GPU with replays and peaks made them."""
    path = folder / "of_a_gpu.jsonl"
    about = {"gpu": "a GPU", "driver": "1", "quick": False}
    for row in rows:
        peak = {"peak_bytes": 1} if "peak_bytes" in row else {}
        if row.get("replays", True):
            append(path, row | peak | {"about": row["about"] | about})
    return complaints(path)


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_and_kill(path: Path, command: tuple, moments: list[int], pause: float) -> list[Row]:
    """The rows of a run that is killed at so many rows, goes on, and has measured nothing twice."""
    seeded = random.Random(0)
    for moment in moments:
        process = start(*command)
        while count(path) < moment:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seeded.uniform(0, pause))
        before = path.read_bytes() if path.exists() else b""
        kill_all(process)
        rows, torn = read(path)
        assert torn == []
        assert path.exists() is False or path.read_bytes().startswith(before)
        assert len({identity(row) for row in rows}) == len(rows)
    assert start(*command).wait() == 0
    rows, torn = read(path)
    assert torn == []
    assert len({identity(row) for row in rows}) == len(rows)
    return rows


def test_run_that_is_killed_twenty_times_measures_everything_once(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wanted = run_and_kill(whole / "rows.jsonl", ("tests.gpu_shards", whole), [], 0.0)
    assert len(wanted) == 6 * 8 + 6
    moments = sorted(random.Random(0).sample(range(len(wanted) - 1), 20))
    rows = run_and_kill(killed / "rows.jsonl", ("tests.gpu_shards", killed), moments, 0.2)
    assert {identity(row) for row in rows} == {identity(row) for row in wanted}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_dry_run_that_is_killed_measures_every_shard(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "out"
    dry = "benchmarks.gpu", "--quick", "--seconds", "1500", "--out", out, "--resume"
    rows = run_and_kill(out / "rows.jsonl", dry, [3, 30, 60], 1.0)
    assert rows[0]["stage"] == "environment"
    assert {row["stage"] for row in rows} == {
        *("environment", "floors", "correctness", "steps", "threshold", "graphs", "sweep", "run")
    }
    shards = subprocess.check_output([sys.executable, "-m", *dry, "--plan"], cwd=ROOT, text=True)
    planned = re.findall(r"^(\w+) .* s at .* s  (.*)$", shards, re.M)
    done = {row["name"] for row in rows if row["stage"] == "run"}
    assert done == {name for stage, name in planned if stage not in (plan.TABLE, plan.PROFILE)}
    table = (out / "table.md").read_text()
    assert "0 failed" in table
    assert "torch.compile of the same" in table
    compile((out / "tiles.py").read_text(), "tiles.py", "exec")
    assert complaints_of_a_gpu(rows, tmp_path) == []
    assert len(list(out.iterdir())) <= 8
