"""`python -m trainer plan`: what it prints, takes and refuses."""

import json

import pytest

from tests.trainer.test_plan import BIG, job_of
from trainer.__main__ import main
from trainer.plan.devices import cpu
from trainer.plan.job import Assumptions
from trainer.plan.plan import plan
from trainer.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(preset, capsys):
    gpus = "1" if preset in ("tiny", "qwen3-0.6b", "qwen3-1.7b") else "128"
    assert main(["plan", preset, "--gpus", gpus, "--gpu", "h200", "--json"]) in (0, 1)
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
    assert main(["plan", "qwen3-14b", "--gpus=128", "--gpu=h200"]) == 0
    text = capsys.readouterr().out
    found = plan(BIG)
    assert "14.77 G parameters on 128 GPUs, 16 nodes" in text
    assert f"fits: {found.peak[1] / 1e9:.2f} of 150.75 GB per GPU" in text
    assert all(part in text for parts in found.memory.values() for part in parts)
    assert all(f"{name} = " in text for name in vars(Assumptions()))
    assert "Assumed, not measured" in text
    assert "NVIDIA's data sheet of the H200 SXM" in text


def test_what_does_not_fit_names_its_largest_part(capsys):
    assert main(["plan", "qwen3-32b", "--gpus", "8", "--gpu", "h200"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: 173.75 of 150.75 GB per GPU at the peak (sample)" in text
    assert "the largest part: engine's weights, 65.52 GB" in text
    assert "Seconds" not in text
    assert main(["plan", "qwen3-32b", "--gpus", "128", "--gpu", "h100"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "would fit: " in text
    assert "vLLM does not start: engine.memory_utilization leaves 3.01 GB too little" in text


def test_own_numbers_and_options_of_the_run(capsys):
    own = ["--gpu-memory=10", "--gpu-tflops=1000", "--gpu-bandwidth=2", "--gpu-network=3"]
    own += ["--optimizer.tokens-per-micro-batch", "6000", "--assume.mfu", "0.5"]
    assert main(["plan", "qwen3-0.6b", *own, "--json"]) == 1
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
        (["huge"], "no preset 'huge'; there are tiny"),
        (["--gpu", "h1000"], "no GPU 'h1000' is known; there are a100-40gb, a100-80gb, h100, h200"),
        (["--gpu", "H100 PCIe"], "no GPU 'H100 PCIe' is known"),
        (
            ["qwen3-14b", "--gpus=8", "--engine.placement=beside", "--engine.devices", *"4567"],
            "engine.devices must name tensor_parallel, 1, GPUs for each of the 8 ranks",
        ),
        (["--gpus", "12"], "gpus must be a multiple of gpus_per_node"),
        (["--gpu-memory", "-1"], "a GPU's numbers must be positive"),
        (["--gpu", "cpu", "--gpu-tflops", "1"], "needs both --gpu-tflops and --gpu-bandwidth"),
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


def run_folder(folder, lengths, truncated):
    folder.mkdir()
    rows = [{"step": 0, "eval/accuracy": 0.5}]
    for step, (length, share) in enumerate(zip(lengths, truncated, strict=True), start=1):
        rows.append({"step": step, "response/length": length, "response/truncated": share})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_lengths_of_a_run_are_those_of_its_last_steps(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [9000.0] * 5 + [3000.0] * 10, [0.5] * 5 + [0.1] * 10)
    options = ["plan", "qwen3-14b", "--gpus=8", "--gpu=h200", "--json"]
    main([*options, "--lengths", run])
    read = json.loads(capsys.readouterr().out)
    assert read["lengths"] == {"mean": 3000.0, "limit": 20_480, "truncated": pytest.approx(0.1)}
    main(options)
    assumed = json.loads(capsys.readouterr().out)
    assert assumed["lengths"] == {"mean": 0.37 * 20_480, "limit": 20_480, "truncated": 0.0}
    assert read["seconds"]["decode"] < assumed["seconds"]["decode"]
    main([*options, "--mean-length=3000"])
    given = json.loads(capsys.readouterr().out)
    assert given["lengths"]["mean"] == 3000
    assert given["seconds"]["decode"] < read["seconds"]["decode"]


def test_lengths_that_are_not_there_are_named(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    empty = run_folder(tmp_path / "empty", [], [])
    for options, says in [
        (["--lengths", str(tmp_path / "new")], "metrics.jsonl is missing"),
        (["--lengths", empty], "has no response/length yet"),
        (["--lengths", empty, "--mean-length", "3"], "exclude each other; got both"),
        (["--mean-length", "50"], "the mean length must lie in (0, 48]"),
    ]:
        assert main(["plan", *options]) == 1
        assert says in capsys.readouterr().err


def test_a_file_of_settings_is_planned(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: qwen3-14b\nengine: {memory_utilization: 0.6}\nsteps: 10\n")
    assert main(["plan", "--config", str(file), "--gpus=8", "--gpu=h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["totals"]["steps"], found["fits"]) == (10, True)


def test_tight_is_told_with_what_to_do(capsys):
    options = ["plan", "qwen3-14b", "--gpus", "8", "--gpu", "H200"]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "tight: 146.76 of 150.75 GB per GPU at the peak (sample), 2.6% free; less than the 10% for "
        "fragmentation and what is counted too low"
    )
    assert lines[2] == "it fits with --engine.memory-utilization 0.7"
    assert main([*options, "--engine.memory-utilization", "0.7"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("fits: 131.68 of 150.75 GB per GPU")


def test_totals_are_printed(capsys):
    main(["plan", "qwen3-14b", "--gpus=128", "--gpu=h200"])
    text = capsys.readouterr().out
    totals = plan(BIG).totals
    for label, value in [
        ("evaluations, the first before training", "21"),
        ("GB of a checkpoint", "177.22"),
        ("GB on disk, 7 kept and one in writing", "1,299.61"),
        ("hours", f"{totals.hours:,.1f}"),
        ("GPU-hours, of 128 GPUs", f"{totals.gpu_hours:,.0f}"),
    ]:
        assert any(label in line and f" {value} " in line for line in text.splitlines()), label
    assert "The whole run; times are estimated" in text
