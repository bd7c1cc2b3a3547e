"""Tensors of a model and its optimizer, sharded or not, to safetensors files and back.

By torch.distributed.checkpoint: each rank writes the shards it holds, and reads those it wants
from whichever files have them. So the files do not tie a run to a number of ranks. A file's header
says where its shards lie. There is no other metadata, and no pickle.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer.ranks import Ranks

# The bytes of a file on each rank: torch makes a whole file in memory before it writes it.
FILE_BYTES = 1 << 29

Tensors = dict[str, Tensor]


def weights(model: nn.Module) -> Tensors:
    """Parameters and buffers by their names in `state_dict`; a tied one once."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {
        name: value.detach()
        for name, value in state.items()
        if names.setdefault(id(value), name) == name
    }


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's tensors by parameter and kind: "model.norm.weight.exp_avg", fp32 "...step".

    Not by torch's get_optimizer_state_dict: where there is no state yet it takes a step of zero
    gradients, which AdamW counts.
    """
    return {
        f"{name}.{kind}": value
        for name, (_, parameter) in _trained(model, optimizer).items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Give `optimizer` the tensors that were written, in the shards of its parameters; collective.

    Raises:
        ValueError: they are of other parameters.
    """
    trained = _trained(model, optimizer)
    tensors: Tensors = {}
    state: dict[int, Tensors] = {}
    for key, saved in metadata(folder).items():
        name, _, kind = key.rpartition(".")
        if name not in trained:
            raise ValueError(f"{folder} has {key}, and the optimizer no parameter {name}")
        index, parameter = trained[name]
        dtype = saved.properties.dtype
        like = saved.size == parameter.shape
        tensors[key] = (
            torch.zeros_like(parameter, dtype=dtype)
            if like
            else torch.zeros(saved.size, dtype=dtype)
        )
        state.setdefault(index, {})[kind] = tensors[key]
    read(tensors, folder, ranks)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write(tensors: Tensors, folder: Path, ranks: Ranks) -> None:
    """Write the shards of `tensors` that this rank holds to files of `folder`; collective.

    One process writes whole tensors and an index, as transformers does.

    Raises:
        OSError: on every rank, where one of them could not write.
    """
    _check_group(tensors, ranks)
    if not tensors:
        return
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_file_numbers(tensors, ranks.size),
        save_distributed=ranks.size > 1,
    )
    alone = ranks.group is None
    with _torch_errors():
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=alone)


def read(tensors: Tensors, folder: Path, ranks: Ranks) -> None:
    """Fill `tensors`, or this rank's shards of them, from the files of `folder`; collective.

    Raises:
        ValueError: a tensor is not there, or has another shape.
    """
    _check_group(tensors, ranks)
    reader = HuggingFaceStorageReader(str(folder))
    alone = ranks.group is None
    try:
        with _torch_errors():
            dcp.load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=alone)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} is not of this model: {error}") from error


def read_whole(folder: Path) -> Tensors:
    """Every tensor of the files of `folder`, put together on the CPU."""
    tensors = {
        name: torch.empty(saved.size, dtype=saved.properties.dtype)
        for name, saved in metadata(folder).items()
    }
    read(tensors, folder, Ranks(torch.device("cpu")))
    return tensors


def metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and shards of every tensor in the files of `folder`, by name."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: saved for name, saved in found.items() if isinstance(saved, TensorStorageMetadata)
    }


def _trained(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[int, nn.Parameter]]:
    """The optimizer's parameters, and their places in its state_dict, by name."""
    names: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), name)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[id(parameter)]: (i, parameter) for i, parameter in enumerate(parameters)}


def _file_numbers(tensors: Tensors, size: int) -> dict[str, int]:
    """The file, from 1, that a tensor or its shards go into: each of about FILE_BYTES a rank."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in tensors.items():
        share = tensor.numel() * tensor.element_size() // size
        if filled and filled + share > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += share
    return numbers


def _check_group(tensors: Tensors, ranks: Ranks) -> None:
    sharded = any(isinstance(t, DTensor) and t.device_mesh.size() > 1 for t in tensors.values())
    if sharded and ranks.group is None:
        raise ValueError("a sharded model's checkpoint needs the group of its ranks; got none")


@contextmanager
def _torch_errors() -> Iterator[None]:
    """Unwrap a rank's error, and silence torch's warning of going without a group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
