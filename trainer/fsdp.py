"""FSDP2: weights, gradients and optimizer state sharded over the ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.ranks import Ranks


def shard(policy: nn.Module, model: Any, ranks: Ranks, compute_dtype: torch.dtype | None) -> None:
    """Shard each layer of `model`, and what else `policy` has, over `ranks`, in place.

    A layer is gathered for its forward and again for its backward. All else (embedding, last norm
    and head, tied or not) is gathered once, for the forward of `policy`, and stays whole until its
    backward is done, since the head's backward reads the weight that its forward has read.
    Arithmetic is in `compute_dtype`; the shards and their gradients keep the dtype of the weights,
    gradients being added up in fp32 and divided by the number of ranks.

    Raises:
        ValueError: a model that does not name the classes of its layers.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} cannot be sharded: its _no_split_modules name no layer it has"
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def release(policy: nn.Module) -> None:
    """Drop what a forward without a backward has left gathered."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all ranks where it is sharded; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
