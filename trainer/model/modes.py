"""A model that trains as it samples: without dropout, jitter or any other noise.

Ratios compare the policy with the one that sampled, and would be noise with another network each
time. So no module is ever in train mode, whatever its settings are called and wherever they stand;
they stay in the configuration, and are saved with it.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

# glibc's name of the setting, and the size from which on blocks are the system's and not its own.
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 4 << 20


def without_noise(model: Any) -> None:
    """Let `model.train()` do no more from now on than make layers recompute their activations.

    A layer does where its flag of training is on; its own forward runs with the flag off again.
    """
    model.train = partial(_train, model)
    model.eval()


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(model, False)
    for layer in _checkpointed(model):
        layer.training = mode
    return model


def checkpoint_activations(model: Any) -> None:
    """Let backward recompute the activations of each layer, and freed memory go back at once.

    glibc keeps blocks of up to 32 MiB between others that stay: 1.4 GB in a step of 0.6 B
    parameters on 2 x 1,024 tokens, on a CPU. A threshold that the environment sets is left.

    Raises:
        ValueError: transformers knows no layer of the model that can.
    """
    # Its name changed within transformers 5.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    layers = _checkpointed(model)
    if not layers:
        raise ValueError(
            f"model.gradient_checkpointing must be False: {type(model).__name__} has no layer that "
            "recomputes its activations"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_recompute, layer)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def _checkpointed(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]


def _recompute(layer: Any, forward: Callable, *args: Any) -> Any:
    """What `forward` of `layer` gives, now and again in backward; in eval mode both times."""

    def run(*args: Any) -> Any:
        training, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = training

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's generators, on the CPU and on `device`."""
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
