"""What a run needs and a machine lacks is one line, before anything else happens."""

from dataclasses import replace

import pytest
import torch

from tests.trainer.small import settings
from trainer.__main__ import main
from trainer.config import Config, Data, Engine, Eval, Model, Tracking
from trainer.launch.needs import BASE, check_needs, needs
from trainer.presets import PRESETS
from trainer.train import train

NEEDS = "trainer.launch.needs."


@pytest.fixture
def _bare(monkeypatch):
    """A machine without any of the optional libraries, and without a GPU."""
    monkeypatch.setattr(NEEDS + "find_spec", lambda name: True if name in BASE else None)
    monkeypatch.setattr(NEEDS + "_version", lambda name: None)
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


WANTS = [
    (
        {"model": Model(attention="flash_attention_2", dtype="bfloat16")},
        r"a CUDA device \(model.attention flash_attention_2\): or --model.attention sdpa; "
        r"flash-attn \(model.attention flash_attention_2\): pip install flash-attn "
        r'--no-build-isolation, or pip install "kernels[^"]*" for one that the hub has compiled, '
        r"or --model.attention sdpa$",
    ),
    ({"model": Model(attention="flash_attention_3")}, r"bfloat16 .*; flash-attn-3 \(model.att"),
    ({"model": Model(attention="flash_attention_4")}, r"flash-attn-4 .*pip install --pre flash-"),
    (
        {"model": Model(attention="kernels-community/flash-attn2")},
        r'; kernels \(model.attention kernels-community/flash-attn2\): pip install "kernels',
    ),
    ({"engine": Engine("vllm")}, r'vllm 0.32 or newer \(engine.kind vllm\): pip install "vllm>='),
    ({"data": Data("gym:gcd")}, r'reasoning-gym \(data.task gym:gcd\): pip install -e "\.\[gym\]"'),
    (
        {"data": Data("hub:x/y")},
        r'datasets \(data.task hub:x/y\): pip install -e "\.\[trainer\]"; math-verify \(',
    ),
    ({"eval": Eval(data=("aime24",))}, r"datasets \(eval.data aime24\): .*; math-verify \(eval"),
    ({"tracking": Tracking(("wandb",))}, r"wandb \(tracking.trackers wandb\): pip install wandb"),
]


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(("changes", "says"), WANTS, ids=[row[1][:24] for row in WANTS])
def test_a_run_says_what_it_needs_before_it_starts(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        train(replace(settings(tmp_path), **changes))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("not here, but needed: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_bare")
def test_every_command_that_runs_a_model_says_the_same_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.studies.compare.driver.drive", lambda *_: pytest.fail("runs began")
    )
    commands = [
        ["train", "qwen3-14b", "--root", str(tmp_path)],
        ["compare", "qwen3-14b", "--root", str(tmp_path)],
        ["evaluate", "--model", "nowhere", "--data", "aime24", "--engine.kind", "vllm"],
        ["analyze", "patterns", "--model=nowhere", "--data=aime24", "--engine.kind=vllm"],
    ]
    for command in commands:
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert 'vllm 0.32 or newer (engine.kind vllm): pip install "vllm>=0.32"' in line
        assert "datasets (" in line
    assert not list(tmp_path.iterdir())


def test_libraries_of_every_command_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(NEEDS + "find_spec", lambda name: None)
    monkeypatch.setattr("trainer.train.train", lambda *_: pytest.fail("the run began"))
    assert main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: python -m trainer needs torch, tyro, rich, numpy, ")
    assert line.endswith('accelerate: pip install -e ".[trainer]"')


def test_what_is_here_is_no_matter():
    for config in (Config(), replace(Config(), data=Data("file:x.jsonl"))):
        check_needs(config)
    assert all(need.there for need in needs(replace(Config(), data=Data("hub:x/y"))))


def test_a_gpu_without_bfloat16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    config = PRESETS["qwen3-1.7b"]()
    says = r"a GPU with bfloat16 \(model.compute_dtype bfloat16\): --model.compute-dtype float32"
    with pytest.raises(ValueError, match=says):
        check_needs(config)


def test_the_plan_lists_them_and_starts_without(capsys, monkeypatch):
    monkeypatch.setattr(NEEDS + "_version", lambda name: None)
    assert main(["plan", "qwen3-14b", "--gpus", "128", "--gpu", "h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    asked = [line for line in lines if line.startswith("needs ")]
    for start in ("a CUDA device (model.attention", "flash-attn (", "vllm 0.32", "datasets (data"):
        assert any(line.startswith(f"needs {start}") for line in asked), start
    assert any(line.endswith('pip install -e ".[trainer]"') for line in asked)
