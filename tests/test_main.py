"""python -m entropy_kernels: it reports what works, and does not report what does not."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

import entropy_kernels as ek
from entropy_kernels import __main__ as main
from entropy_kernels import _native, backends, reference
from entropy_kernels._cuda_kernels import module as cuda
from entropy_kernels.testing import peaked_head
from tests.processes import forkserver

ROOT = Path(__file__).parents[1]
# What one process starts another with; nobody types them.
INTERNAL = {
    "benchmarks.bench_train_step",
    "benchmarks.gpu.one_launch",
    "benchmarks.gpu.worker",
    "tests.gpu_shards",
    "tests.trainer.hostile_answers",
    "tests.trainer.vllm_rank",
    "trainer.rewards.worker",
}


def programs() -> list[str]:
    """The modules that somebody may run with `python -m`."""
    found = []
    folders = ("benchmarks", "entropy_kernels", "examples", "tests", "tools", "trainer")
    for path in sorted(path for name in folders for path in (ROOT / name).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        if re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE):
            found.append(module)
    return sorted({*found} - INTERNAL)


@pytest.mark.parametrize("module", programs())
def test_help_says_how_to_use_it_and_does_nothing_else(module, tmp_path):
    """Most of the time is imports; none of them computes for so long."""
    out, error, folder = (tmp_path / name for name in ("out", "error", "folder"))
    folder.mkdir()
    process = forkserver().Process(target=ask_for_help, args=(module, folder, out, error))
    process.start()
    process.join(900)
    assert process.exitcode == 0, error.read_text()[-2000:]
    assert re.match(r"usage: |.*`python -m", out.read_text()), out.read_text()
    assert list(folder.iterdir()) == []


def ask_for_help(module, folder, out, error):
    """python -m MODULE --help, in a process of its own."""
    os.chdir(folder)
    for number, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = [module, "--help"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("command", ["watch", "report", "export", "evaluate", "train", "plan"])
def test_help_of_every_command_of_the_trainer(command, capsys):
    from trainer import __main__ as trainer

    with pytest.raises(SystemExit) as end:
        trainer.main([command, "--help"])
    assert end.value.code == 0
    assert "usage: python -m trainer" in capsys.readouterr().out


def test_every_backend_is_checked(capsys):
    assert main.main([]) == 0
    printed = capsys.readouterr().out
    assert "linear_logprob_entropy, torch on cpu: ok" in printed
    assert "ratio_loss, torch on cpu: ok" in printed
    assert "top_entropy_mask on cpu: ok" in printed
    assert f"entropy_kernels {ek.__version__}" in printed
    assert "compiled CPU kernels: " + (_native.why_missing("cpu") or "loaded") in printed
    assert f"CUDA kernels: {cuda.state()}\n" in printed


def test_a_wrong_result_fails(capsys, monkeypatch):
    def wrong(*args, **kwargs):
        logprob, entropy, logsumexp = truth(*args, **kwargs)
        return logprob, entropy * 1.001, logsumexp

    truth = reference.linear_logprob_entropy
    monkeypatch.setattr(reference, "linear_logprob_entropy", wrong)
    monkeypatch.setattr(reference, "top_entropy_mask", lambda entropy: entropy > 0.5)
    monkeypatch.setattr(reference, "ratio_loss", lambda logprob, *_: logprob.sum())
    assert main.main([]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: entropy is off by 1.0e-03" in printed
    assert "FAILED: the loss is off by" in printed
    assert "tokens differ" in printed


def test_a_triton_that_is_too_old_is_named(monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    monkeypatch.setattr(backends, "why_no_triton", backends.why_no_triton.__wrapped__)
    assert main.main([]) == 0
    why = (
        "Triton must be 3.6 or newer; got 3.5.1. It is torch's own: torch 2.10 and newer bring one"
    )
    assert why in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Triton must be 3\.6 or newer; got 3\.5\.1"):
        ek.linear_logprob_entropy(ek.Head(*peaked_head(3, 8, 11)), impl="triton")
