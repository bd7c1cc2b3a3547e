"""`model.impl`: the backend that a run, an analysis and a warm start name computes all of them."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch

from entropy_kernels import backends
from entropy_kernels.backends import OPS
from tests.marks import sampled
from tests.trainer.analyze_cases import here, models, options, sums  # noqa: F401
from tests.trainer.small import on_even, settings  # noqa: F401
from tests.which_ran import ALL, HEAD, LOSS, SELECTION, WhichRan
from trainer.__main__ import main
from trainer.config import Algorithm, Config, Model, Rollout, WarmStart
from trainer.config.model import Impl
from trainer.launch.needs import check_needs
from trainer.policy import read_policy
from trainer.run import _warm_start
from trainer.studies.analyze.evolution import Evolution, analyze_evolution
from trainer.studies.analyze.patterns import Patterns, analyze_patterns
from trainer.studies.analyze.temperatures import Temperatures, analyze_temperatures
from trainer.tasks.ladder import Ladder
from trainer.train import train

pytestmark = sampled(0.2)


@pytest.fixture
def ran(monkeypatch):
    return WhichRan(monkeypatch)


def test_the_names_are_the_package_s():
    assert get_args(Impl) == OPS["linear_logprob_entropy"].impls


WAYS = {
    "old": Algorithm(min_groups=1),
    "current": Algorithm(min_groups=1, entropy_source="current"),
    "random": Algorithm(min_groups=1, which="random"),
    "grpo": Algorithm(min_groups=1, loss_type="grpo"),
}


def one_step(folder, model, impl, algorithm):
    small = settings(
        folder,
        steps=1,
        algorithm=algorithm,
        rollout=Rollout(prompts=4, group_size=4, max_new_tokens=3, batch_size=16),
    )
    small = replace(small, model=Model(model, impl=impl))
    train(small)
    rows = (small.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["updates"] > 0
    return json.loads((small.folder / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run(way, impl, ran, model, tmp_path):
    written = one_step(tmp_path, model, impl, WAYS[way])
    ran.assert_only(impl, ALL)
    assert written["config"]["model"]["impl"] == impl


def test_a_run_by_the_reference(ran, model, tmp_path):
    """Which is the head's alone."""
    one_step(tmp_path, model, "reference", WAYS["random"])
    ran.assert_only("torch", SELECTION | LOSS)


def test_a_warm_start(impl, ran, tmp_path):
    small = settings(
        tmp_path,
        warm_start=WarmStart(steps=1, traces=4, batch_size=2, cache=str(tmp_path / "cache")),
    )
    small = replace(small, model=Model(impl=impl))
    _warm_start(small, read_policy(small.model, 0), Ladder(0), torch.device("cpu"))
    ran.assert_only(impl, HEAD)


@pytest.mark.slow
def test_the_analyses(impl, ran, models, sums, tmp_path):  # noqa: F811
    given = options(sums, tmp_path / "out") | {"impl": impl, "samples": 1, "max_new_tokens": 3}
    analyze_patterns(Patterns(models[0], **given))
    ran.assert_only(impl, HEAD - {"backward"} | SELECTION)
    analyze_evolution(Evolution(models[0], checkpoints=models, bins=2, **given))
    # Masks of tokens that were brought to the CPU are made there.
    assert ran.seen - {("radix_histogram", "cpu")} <= {("forward", impl), ("radix_histogram", impl)}
    ran.seen.clear()
    analyze_temperatures(Temperatures(models[0], low=(), high=(1.0,), **given))
    ran.assert_only(impl, HEAD - {"backward"} | SELECTION)


def test_a_backend_that_cannot_run_is_one_line_before_the_model_loads(monkeypatch, capsys):
    monkeypatch.setattr(backends.device, "interpreting", lambda: False)
    monkeypatch.setattr("trainer.policy.read_folder", lambda *_, **__: pytest.fail("it loads"))
    for command in (
        ["train", "--model.impl", "triton", "--model.path", "nowhere"],
        ["compare", "--model.impl", "triton", "--model.path", "nowhere"],
        ["analyze", "patterns", "--model", "nowhere", "--data", "ladder", "--impl", "triton"],
    ):
        assert main([*command, "--device", "cpu"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            "the backend triton (model.impl triton): Triton kernels need tensors on a GPU" in line
        )
        assert line.endswith("; or --model.impl auto")


def test_a_gpu_has_no_compiled_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"the backend cpu .* tensors on the CPU; got cuda"):
        check_needs(Config(model=Model(impl="cpu")))
    check_needs(Config(model=Model(impl="cpu"), device="cpu"))


@pytest.mark.parametrize(
    ("gpu", "impl"), [("h100", "cpu"), ("cpu", "triton"), ("cpu", "cuda"), ("h100", "reference")]
)
def test_a_plan_refuses_what_it_does_not_count(gpu, impl, capsys):
    assert main(["plan", "qwen3-14b", "--gpu", gpu, "--model.impl", impl]) == 1
    assert "model.impl must be one of auto, " in (said := capsys.readouterr().err)
    assert said.rstrip().endswith(f"got {impl!r}")
