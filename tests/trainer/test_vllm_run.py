"""Runs whose responses vLLM samples: they learn, resume, and see no mismatch in fp32."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import trainer.run
from tests.trainer.small import Even, metrics, use_task
from tests.trainer.vllm_cases import IGNORED, configure  # first: it skips where vLLM is missing
from trainer.checkpoint.sharded import read_whole
from trainer.config import Model
from trainer.log import read_rows
from trainer.train import train

pytestmark = IGNORED
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _even():
    before = trainer.run.make_task
    use_task(Even())
    yield
    trainer.run.make_task = before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps inside."""
    config = configure(tmp_path_factory.mktemp("whole"), "inside")
    train(config)
    return config


def test_in_fp32_there_is_no_mismatch(whole):
    updates = [row for row in metrics(whole.folder) if "loss" in row]
    assert len(updates) >= 2
    for row in updates:
        assert row["mismatch/max_ratio"] == pytest.approx(1, abs=1e-4)
        assert 0 <= row["mismatch/kl"] < 1e-9
        assert row["mismatch/difference"] < 1e-5
        assert "mismatch/corrected" not in row


@pytest.mark.parametrize("placement", ["inside", "beside"])
def test_a_stopped_run_ends_as_one_that_was_not(whole, placement, tmp_path):
    """And beside as inside."""
    config = configure(tmp_path, placement, steps=2)
    train(config)
    train(dataclasses.replace(config, steps=4))
    assert metrics(config.folder) == metrics(whole.folder)
    last = Path("run") / "checkpoints" / "step-000004"
    found, wanted = read_whole(tmp_path / last), read_whole(Path(whole.root) / last)
    assert found.keys() == wanted.keys()
    assert all(value.equal(wanted[name]) for name, value in found.items())


def test_in_bf16_the_mismatch_is_seen_and_corrected(tmp_path):
    config = configure(tmp_path, "inside", steps=2)
    config = dataclasses.replace(config, model=Model(dtype="bfloat16"))
    train(config)
    updates = [row for row in metrics(config.folder) if "loss" in row]
    assert updates
    for row in updates:
        assert 1e-9 < row["mismatch/kl"] < 0.1
        assert row["mismatch/corrected"] < 0.5


@pytest.mark.parametrize("placement", ["inside", "beside"])
def test_two_sharded_ranks_with_an_engine_each_are_as_one(whole, placement, tmp_path):
    """Under torchrun, whose process group is up when vLLM starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.trainer.vllm_rank", placement, str(tmp_path), "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    got = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in got] == [0, 1, 2]
    assert any("loss" in row for row in got)
    for one, other in zip(got, metrics(whole.folder), strict=False):
        for name in other.keys() - {"mismatch/kl", "mismatch/difference"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_an_engine_beside_ends_with_a_trainer_that_is_killed(tmp_path):
    command = [sys.executable, "-m", "tests.trainer.vllm_rank", "beside", str(tmp_path), "30000"]
    trainer = psutil.Popen(command, cwd=ROOT)
    rows_of_run = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (rows_of_run.exists() and rows_of_run.read_text()):
        assert trainer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = trainer.children(recursive=True)
    assert len(children) >= 2
    trainer.kill()
    trainer.wait()
    _, left = psutil.wait_procs(children, timeout=100)
    assert not left
