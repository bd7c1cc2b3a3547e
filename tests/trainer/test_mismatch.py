"""The mismatch of sampler and trainer, by hand, and when it is corrected."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from tests.trainer.small import settings
from trainer.config import Algorithm, Engine, Model
from trainer.metrics import correction, mismatch_metrics

CONFIG = settings(Path())
RATIOS = torch.tensor([1.0, 2.0, 0.25, 5.0])
OLD = torch.tensor([-0.5, -1.0, -2.0, -3.0])


def configure(engine=CONFIG.engine, model=CONFIG.model, **algorithm):
    return dataclasses.replace(
        CONFIG, engine=engine, model=model, algorithm=Algorithm(min_groups=1, **algorithm)
    )


def measure(config):
    return mismatch_metrics(OLD, OLD - RATIOS.log(), config)


def test_metrics_are_those_of_the_formulas():
    logs = [math.log(r) for r in (1, 2, 0.25, 5)]
    got = measure(CONFIG)
    assert got["mismatch/kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in logs) / 4, rel=1e-6)
    assert got["mismatch/max_ratio"] == pytest.approx(5, rel=1e-6)
    assert got["mismatch/difference"] == pytest.approx(sum(map(abs, logs)) / 4, rel=1e-6)
    assert "mismatch/corrected" not in got


@pytest.mark.parametrize(
    ("cap", "floor", "share"), [(2.5, 0.0, 0.25), (1.5, 0.0, 0.5), (1.5, 0.5, 0.75), (6.0, 0.1, 0)]
)
def test_counts_the_tokens_that_are_corrected(cap, floor, share):
    config = configure(correction="mis", correction_cap=cap, correction_floor=floor)
    assert measure(config)["mismatch/corrected"] == share


def test_the_kl_of_equal_policies_is_zero_though_rounded():
    got = mismatch_metrics(OLD, OLD + 1e-6, CONFIG)
    assert 0 <= got["mismatch/kl"] < 1e-11


@pytest.mark.parametrize(
    ("engine", "model", "asked", "name"),
    [
        (Engine(), Model(), "auto", None),
        (Engine(kind="vllm"), Model(), "auto", None),
        (Engine(), Model(dtype="bfloat16"), "auto", "tis"),
        (Engine(kind="vllm", dtype="bfloat16"), Model(), "auto", "tis"),
        (Engine(), Model(dtype="bfloat16"), "none", None),
        (Engine(), Model(), "mis", "mis"),
    ],
)
def test_corrects_in_bf16_unless_told_otherwise(engine, model, asked, name):
    config = configure(engine, model, correction=asked, correction_cap=3.0)
    found = correction(config, OLD)
    assert found.type == name
    if name is not None:
        assert (found.cap, found.floor, found.sampler_logprob) == (3.0, 0.0, OLD)


@pytest.mark.parametrize("bounds", [(0.9, 0.0), (2.0, 1.1), (2.0, -0.1)])
def test_bounds_that_correct_equal_policies_raise(bounds):
    cap, floor = bounds
    with pytest.raises(ValueError, match=r"correction_floor <= 1 <= correction_cap"):
        Algorithm(correction_cap=cap, correction_floor=floor)
