"""verl's modules that the tests of the adapter call, with a small model and settings for them.

Where verl is not installed, the tests that import this are skipped.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.small_models import build

MISSING = "verl is not installed"
heads = pytest.importorskip("verl.utils.experimental.torch_functional", reason=MISSING)
monkey_patch = pytest.importorskip("verl.models.transformers.monkey_patch", reason=MISSING)
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=MISSING)
losses = pytest.importorskip("verl.workers.utils.losses", reason=MISSING)
config = pytest.importorskip("verl.workers.config", reason=MISSING)
tu = pytest.importorskip("verl.utils.tensordict_utils", reason=MISSING)


def fused(family: str = "qwen3", backend: str = "torch", **changes: Any) -> Any:
    """A model that verl patched; its class is its own, for verl replaces the class's forward."""
    model = build(family, **changes)
    model.__class__ = type("Own", (type(model),), {})
    monkey_patch.patch_forward_with_backends(
        model, use_fused_kernels=True, fused_kernels_backend=backend
    )
    return model


def actor(loss_mode: str = "high_entropy", **options: Any) -> Any:
    """The settings of an actor."""
    policy_loss = config.PolicyLossConfig(loss_mode=loss_mode)
    sizes = {"rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return config.FSDPActorConfig(policy_loss=policy_loss, **sizes, **options)


def nested(rows: Any) -> Tensor:
    """Rows of different lengths as verl's batches hold them."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
