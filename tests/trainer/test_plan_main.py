"""`python -m trainer plan`: what it prints, takes and refuses."""

import json

import pytest

from tests.trainer.test_plan import BIG, job_of
from trainer.__main__ import main
from trainer.plan import plan
from trainer.plan.devices import cpu
from trainer.plan.job import Assumptions
from trainer.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(preset, capsys):
    gpus = "1" if preset in ("tiny", "qwen3-0.6b", "qwen3-1.7b") else "128"
    assert main(["plan", "--preset", preset, "--gpus", gpus, "--gpu", "h200", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == preset
    assert found["fits"]
    assert found["peak"]["bytes"] == max(sum(p.values()) for p in found["memory"].values())
    assert found["seconds"]["step"] > 0


@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen3-1.7b"])
def test_single_gpu_presets_fit_80_gb(preset):
    assert plan(job_of(preset, gpu="h100")).fits
    assert plan(job_of(preset, gpu="a100")).fits


def test_tables_name_every_part_and_assumption(capsys):
    assert main(["plan", "--preset=qwen3-14b", "--gpus=128", "--gpu=h200"]) == 0
    text = capsys.readouterr().out
    found = plan(BIG)
    assert "14.77 G parameters on 128 GPUs, 16 nodes" in text
    assert f"fits: {found.peak[1] / 1e9:.2f} of 141.00 GB a GPU" in text
    assert all(part in text for parts in found.memory.values() for part in parts)
    assert all(f"{name} = " in text for name in vars(Assumptions()))
    assert "Assumed, not measured" in text
    assert "NVIDIA H200 SXM data sheet" in text


def test_what_does_not_fit_names_its_largest_part(capsys):
    assert main(["plan", "--preset", "qwen3-32b", "--gpus", "8", "--gpu", "h200"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: 165.94 of 141.00 GB a GPU at the peak (sample)" in text
    assert "the largest part: engine's weights, 65.52 GB" in text
    assert "Seconds" not in text
    assert main(["plan", "--preset", "qwen3-32b", "--gpus", "128", "--gpu", "h100"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit" not in text
    assert "vLLM does not start: engine.memory_utilization leaves 7.43 GB too little" in text


def test_own_numbers_and_options_of_the_run(capsys):
    own = ["--memory-gb", "10", "--tflops", "1000", "--bandwidth-tb", "2", "--network-gb", "3"]
    own += ["--optimizer.tokens-per-micro-batch", "6000", "--assume.mfu", "0.5"]
    assert main(["plan", "--preset", "qwen3-0.6b", *own, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["memory"] == 10e9
    assert (found["device"]["flops"], found["device"]["bandwidth"]) == (1000e12, 2e12)
    assert found["device"]["source"].endswith("memory, flops, bandwidth, network as given")
    assert found["assumptions"]["mfu"] == 0.5
    kept = found["memory"]["last layer"]["activations kept"]
    assert kept == 6000 * 28 * 1024 * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "huge"], "no preset 'huge'; there are tiny"),
        (["--preset"], "no preset ''; there are tiny"),
        (["--gpus", "12"], "gpus must be a multiple of gpus_per_node"),
        (["--memory-gb", "-1"], "a GPU's numbers must be positive"),
        (["--gpu", "cpu", "--tflops", "1"], "needs both tflops and bandwidth_tb"),
        (["--architecture", "no-such"], "no architecture is known for 'no-such'; wanted a"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options, says, capsys):
    assert main(["plan", *options]) == 1
    assert says in capsys.readouterr().err


def test_a_cpu_has_memory_and_no_rates(capsys):
    assert cpu().memory > 1e9
    assert main(["plan", "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] is None
    assert "reserved" not in found["memory"]["head"]
