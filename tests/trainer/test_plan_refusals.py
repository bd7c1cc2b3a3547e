"""What a run refuses for its ranks and its model, and the planner by the same checks."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

import trainer.run
from tests.trainer.small import FAMILIES, build_model, settings
from tests.trainer.test_plan import changed, job_of
from trainer.launch.limits import check_model, model_limits
from trainer.plan.architectures import ARCHITECTURES
from trainer.presets import PRESETS
from trainer.ranks import Ranks
from trainer.run import check_start

BESIDE = {"engine.placement": "beside"}
REFUSED = [
    (8, BESIDE | {"engine.devices": (4, 5, 6, 7)}, "each of the 8 ranks of a machine; got"),
    (8, BESIDE | {"engine.tensor_parallel": 2}, "must name tensor_parallel, 2, GPUs for"),
    (2, BESIDE | {"engine.devices": (1, 2)}, "must name GPUs that no rank trains on"),
    (2, BESIDE | {"engine.devices": (3, 3)}, "each once; got"),
    (2, BESIDE | {"engine.devices": (7, 8)}, "GPUs of the machine, which has 8; got"),
    (
        1,
        BESIDE | {"engine.devices": (1, 2, 3), "engine.tensor_parallel": 3},
        "must divide the model's 40 heads; got 3",
    ),
    (
        1,
        BESIDE | {"engine.devices": (1, 2, 3, 4, 5), "engine.tensor_parallel": 5},
        "must divide the model's 8 key-value heads",
    ),
    (8, {"rollout.max_new_tokens": 40_000}, "do not fit into the model's 32768 positions"),
    (8, {"rollout.max_new_tokens": 23_000}, "do not fit into engine.max_model_len, 22528"),
    (8, {"eval.max_new_tokens": 30_000}, "do not fit into engine.max_model_len, 22528"),
    (8, {"engine.max_model_len": 40_000}, "at most the model's positions, 32768"),
    (
        8,
        {"engine.kind": "transformers", "rollout.max_new_tokens": 32_768},
        "do not fit into the model's 32768 positions",
    ),
]


@pytest.mark.parametrize(("gpus", "changes", "says"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_the_run_refuses_is_refused(gpus, changes, says, monkeypatch):
    with pytest.raises(ValueError, match=says):
        job_of("qwen3-14b", gpus, changes=changes)
    # And by the run, in a process of so many on a machine of eight GPUs.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(trainer.run, "check_needs", lambda *_: None)
    shape = ARCHITECTURES["qwen3-14b"]
    model = Qwen3Config(
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
    )
    read = SimpleNamespace(model=SimpleNamespace(config=model), tokenizer=None)
    monkeypatch.setattr(trainer.run, "read_policy", lambda *_, **__: read)
    config = changed(PRESETS["qwen3-14b"](), changes)

    def begin():
        check_start(config)
        trainer.run._read(config, Ranks(torch.device("cpu")), None)

    with pytest.raises(ValueError, match=says):
        begin()


def test_ranks_without_sequences_are_no_error_as_in_a_run():
    assert job_of("qwen3-14b", 1024).micro_batch > 0


def test_what_a_run_takes_is_taken():
    engines = BESIDE | {"engine.devices": (4, 5, 6, 7)}
    assert job_of("qwen3-14b", 4, changes=engines).all_gpus == 8
    assert job_of("qwen3-14b", 4, changes=engines, gpus_per_node=2).nodes == 2
    assert job_of("tiny").config.rollout.max_new_tokens == 48


def test_limits_of_models_of_every_family(tmp_path):
    for family in FAMILIES:
        config = build_model(family).config
        assert model_limits(config)[0] == 2
        check_model(settings(tmp_path), *model_limits(config))
    other = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=[2, 4]))
    assert model_limits(other) == (0, 0, None)
    check_model(PRESETS["qwen3-14b"](), *model_limits(other))
