"""Which engine a configuration makes, and what it cannot make."""

import dataclasses
from pathlib import Path

import pytest

from tests.trainer.small import build_policy, settings
from trainer.config import Engine
from trainer.engines import make_engine
from trainer.engines.transformers import TransformersEngine
from trainer.launch import needs

VLLM = settings(Path(), engine=Engine(kind="vllm"))


def test_transformers_is_what_a_run_has_without_asking():
    assert isinstance(make_engine(settings(Path()), build_policy()), TransformersEngine)


def test_says_how_to_install_vllm_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(needs, "_version", lambda name: None)
    with pytest.raises(ValueError, match=r"needed: vllm 0\.32 or newer \(engine.kind vllm\): pip"):
        make_engine(VLLM, build_policy())


def test_refuses_a_vllm_without_the_calls_that_are_made(monkeypatch):
    monkeypatch.setattr(needs, "_version", lambda name: (0, 9))
    with pytest.raises(ValueError, match=r"vllm 0\.32 or newer, not 0\.9 .*: pip install"):
        make_engine(VLLM, build_policy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": (1,)}, r'devices and tensor_parallel > 1 need placement="beside"'),
        ({"tensor_parallel": 2}, r'devices and tensor_parallel > 1 need placement="beside"'),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1; got 0"),
        ({"memory_utilization": 0.0}, r"memory_utilization must lie in \(0, 1\]; got 0.0"),
        ({"max_model_len": -1}, "max_model_len must be at least 0; got -1"),
    ],
)
def test_settings_that_mean_nothing_raise(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VLLM.engine, **options)
