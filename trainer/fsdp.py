"""FSDP2: weights, gradients and optimizer state sharded over the ranks."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.ranks import Ranks


def shard(policy: nn.Module, model: Any, ranks: Ranks, compute_dtype: torch.dtype | None) -> None:
    """Shard each layer of `model`, and the rest of `policy`, over `ranks`, in place.

    A layer is gathered for its forward and again for its backward. The rest (embedding, last norm
    and head, tied or not) is gathered once, for the forward of `policy`. It stays whole until the
    backward is done, since the head's backward reads the weight that its forward has read.
    Arithmetic is in `compute_dtype`. Shards and gradients keep the dtype of the weights; gradients
    are summed in fp32 and divided by the number of ranks.

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


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `model` by name, as they are now; a tied one once."""
    return {
        name: tensor.detach()
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }


def scatter(model: nn.Module, whole: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors of a sharded `model` from `whole`, which only the first rank needs to have.

    Collective. One tensor at a time is whole on the devices.
    """
    for name, tensor in tensors(model).items():
        if ranks.first:
            source = whole[name].to(ranks.device, tensor.dtype)
        else:
            source = torch.empty(tensor.shape, dtype=tensor.dtype, device=ranks.device)
        if isinstance(tensor, DTensor):
            mine = distribute_tensor(source, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(mine.to_local())
        else:
            dist.broadcast(source, 0, group=ranks.group)
            tensor.copy_(source)


def release(policy: nn.Module) -> None:
    """Free the weights that a forward without a backward has left gathered."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all ranks where it is sharded; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
