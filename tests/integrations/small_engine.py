"""verl's FSDP engine around a small model on a CPU, and the micro-batches that it takes.

Where verl is not installed, the tests that import this are skipped.
"""

from typing import Any

import pytest
import torch

from tests.integrations.small_models import VOCABULARY as V
from tests.integrations.small_verl import MISSING, nested, tu

engines = pytest.importorskip("verl.workers.engine.fsdp.transformer_impl", reason=MISSING)

PROMPTS, RESPONSES = [3, 2, 4], [9, 12, 6]
TEMPERATURE = 0.8


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Without CUDA verl takes "cuda" for the device all the same."""
    monkeypatch.setattr(engines, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(engines, "get_device_name", lambda: "cpu")


def engine_of(model: Any, dtype: torch.dtype) -> Any:
    """verl's engine around a model that it did not build: its own needs CUDA or an NPU."""
    engine = object.__new__(engines.FSDPEngineWithLMHead)
    engine.module, engine._autocast_dtype = model, dtype
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine.ulysses_device_mesh = None
    return engine


def micro_batch(temperature: Any = TEMPERATURE, **changes: Any) -> Any:
    """`changes` are settings, or lists with an entry per sequence."""
    generator = torch.Generator().manual_seed(1)
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]

    ids = [torch.randint(V, (n,), generator=generator) for n in lengths]
    tensors = {
        "input_ids": nested(ids),
        "position_ids": nested(torch.arange(n) for n in lengths),
        "prompts": nested(x[:p] for x, p in zip(ids, PROMPTS, strict=True)),
        "responses": nested(x[p:] for x, p in zip(ids, PROMPTS, strict=True)),
        "response_mask": nested(torch.ones(r, dtype=torch.int64) for r in RESPONSES),
        "old_log_probs": nested(-6 + torch.randn(r, generator=generator) for r in RESPONSES),
        "advantages": nested(torch.randn(r, generator=generator) for r in RESPONSES),
    }
    settings = {
        "temperature": temperature,
        "use_fused_kernels": True,
        "use_remove_padding": True,
        "calculate_entropy": True,
        "dp_size": 1,
        "batch_num_tokens": sum(RESPONSES),
        "global_batch_size": len(RESPONSES),
    }
    for name, value in changes.items():
        (tensors if isinstance(value, list) else settings)[name] = value
    return tu.get_tensordict(tensors, settings)
