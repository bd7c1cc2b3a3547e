"""Who samples the responses: an engine for each library."""

import torch

from trainer.config import Config
from trainer.engines.engine import Engine
from trainer.policy import Policy


def make_engine(
    settings: Config,
    policy: Policy,
    device: torch.device | None = None,
    copy_in: torch.dtype | None = None,
) -> Engine:
    """The engine that `settings.engine` names. It needs `update_weights` before it samples, unless
    it is transformers' and shares the model of `policy`.

    `device` is the one the policy will train on, if it is not there yet. `copy_in` is the dtype
    of the weights of transformers' engine, where it cannot share those of `policy`.
    """
    if settings.engine.kind == "vllm":
        from trainer.engines.vllm import VllmEngine

        return VllmEngine(policy, settings, device or policy.device)
    from trainer.engines.transformers import TransformersEngine

    return TransformersEngine(policy, settings.rollout.batch_size, copy_in, device)
