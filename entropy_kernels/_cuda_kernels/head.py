"""The head's kernels, by csrc/cuda/forward.cu and dlogits.cu: what they take, and their launches.

T tokens, C compact rows, D hidden, V vocabulary, S vocabulary splits, N columns of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import device
from .arguments import Given, check, check_temperature, pointer, stream
from .module import architectures, cuda, why_missing

# GPUs that run the kernels of each architecture.
_RUNS = {"sm_80": 80, "sm_86": 80, "sm_87": 80, "sm_89": 80, "sm_90": 90, "sm_100": 100}
# Rows of matrices begin at so many bytes.
_ALIGNED = 16
# Rows and words: the last tiles of a cluster end beyond them, and are counted in 31 bits.
_MOST = (1 << 31) - 1 - 2 * 256
# Caps that have a reciprocal in fp32, by approximate division too; beyond them nothing changes.
_LEAST_CAP, _LARGEST_CAP = 1e-30, 1e30


class Block(NamedTuple):
    """The tile of a kernel: rows, columns and depth of one step."""

    architecture: int
    rows: int
    columns: int
    depth: int


class Product(NamedTuple):
    """What is multiplied, and what the logits pass.

    hidden: bf16 [T, D], or [C, D]; weight: bf16 [V, D]; bias: bf16 [V], or None.
    temperature: fp32 [T], or None for 1.
    softcap: None for none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: Tensor | None = None
    softcap: float | None = None


class Rows(NamedTuple):
    """The rows of a forward, and where their sums go; rows past the number are not written.

    target: int64 [T]; row: int32 [T], that of `logits` for each; number: int32 [1].
    partials: fp32 [4, S, T], with statistics [7, S, T].
    target_logit: fp32 [T].
    logits: fp32 [T, V], without bias and uncapped; None where none are stored.
    """

    target: Tensor
    row: Tensor
    number: Tensor
    partials: Tensor
    target_logit: Tensor
    logits: Tensor | None


class Gradients(NamedTuple):
    """Columns [start, stop) of dz for compact rows, and what it comes of.

    fields: fp32 [6, C]; target: int64 [C]; first: int32 [1], rows before it are left out, or None;
    number: int32 [1].
    dz: bf16 [C, N], rows of dense columns; bias_partials: fp32 [ceil(C / bias_rows()), N] or None.
    has_entropy: whether any gradient of the entropy is given.
    """

    fields: Tensor
    target: Tensor
    first: Tensor | None
    number: Tensor
    dz: Tensor
    bias_partials: Tensor | None
    start: int
    stop: int
    has_entropy: bool


def architecture(arch: str) -> int | None:
    """Whose kernels of the head a GPU of `arch` runs, of those that were built; None if none."""
    if why_missing() is not None:
        return None
    built = {int(name.removesuffix("a")) for name in architectures()}
    return _RUNS[arch] if _RUNS.get(arch) in built else None


def why_not(arch: str, dtype: torch.dtype, hidden: int, weight: Tensor | None = None) -> str | None:
    """What csrc/cuda lacks for a product of D = hidden: what came and what was wanted."""
    if architecture(arch) is None:
        built = why_missing() or ", ".join(f"sm_{name}" for name in architectures())
        return f"kernels of the head must be built for the GPU, {arch}; got {built}"
    if dtype != torch.bfloat16:
        return f"hidden must be torch.bfloat16; got {dtype}"
    if hidden * dtype.itemsize % _ALIGNED:
        return f"the hidden size must be a multiple of {_ALIGNED // dtype.itemsize}; got {hidden}"
    return None if weight is None else _why_unaligned("weight", weight)


def _why_unaligned(name: str, matrix: Tensor) -> str | None:
    row, column = matrix.stride()
    if column != 1 or row < matrix.shape[1] or row * matrix.element_size() % _ALIGNED:
        wanted = f"dense rows at multiples of {_ALIGNED} bytes"
        return f"{name} must have {wanted}; got strides {(row, column)}"
    if matrix.data_ptr() % _ALIGNED:
        return f"{name} must begin at a multiple of {_ALIGNED} bytes; got {matrix.data_ptr():#x}"
    return None


def splits(block: Block, vocabulary: int) -> int:
    """S of a forward."""
    return int(cuda().forward_splits(tile=_tile(block), vocabulary=vocabulary))


def bias_rows() -> int:
    """Compact rows whose dz one partial of the bias's gradient sums."""
    return int(cuda().bias_rows)


def forward(block: Block, product: Product, rows: Rows) -> None:
    """The partial sums of every row, and its target's logit, which the same product gives."""
    count, vocabulary = product.hidden.shape[0], product.weight.shape[0]
    statistics = rows.partials.shape[0] != 4
    n_split = splits(block, vocabulary)
    given: dict[str, Given] = {
        "target": (rows.target, torch.int64, (count,)),
        "index": (rows.row, torch.int32, (count,)),
        "number": (rows.number, torch.int32, (1,)),
        "partials": (rows.partials, torch.float32, (7 if statistics else 4, n_split, count)),
        "target_logit": (rows.target_logit, torch.float32, (count,)),
        "logits": (rows.logits, torch.float32, (count, vocabulary)),
    }
    head = _head("forward", product)
    made = cuda().Forward(
        **check("forward", product.hidden, given), statistics=statistics, splits=n_split
    )
    cuda().forward(
        tile=_tile(block),
        head=head,
        forward=made,
        processors=_processors(block, count, vocabulary, product.hidden.device),
        stream=stream(product.hidden.device),
    )


def dlogits(block: Block, product: Product, into: Gradients) -> None:
    """dz of the compact rows, rounded once from fp32, and the sums of the bias's gradient."""
    count, vocabulary = product.hidden.shape[0], product.weight.shape[0]
    columns = into.dz.shape[1]
    given: dict[str, Given] = {
        "fields": (into.fields, torch.float32, (6, count)),
        "target": (into.target, torch.int64, (count,)),
        "first": (into.first, torch.int32, (1,)),
        "number": (into.number, torch.int32, (1,)),
        "dz": (into.dz, torch.bfloat16, (count, columns)),
        "bias_partials": (into.bias_partials, torch.float32, (-(-count // bias_rows()), columns)),
    }
    head = _head("dlogits", product)
    if not 0 <= into.start < into.stop <= min(vocabulary, into.start + columns):
        got = f"{into.start} to {into.stop} of V = {vocabulary}, into {columns}"
        raise ValueError(f"columns of dlogits must lie in V and fit dz; got {got}")
    _check_aligned("dlogits", "dz", into.dz)
    made = cuda().Dlogits(
        **check("dlogits", product.hidden, given),
        stride_dz=into.dz.stride(0),
        start=into.start,
        stop=into.stop,
        has_entropy=into.has_entropy,
    )
    cuda().dlogits(
        tile=_tile(block),
        head=head,
        dlogits=made,
        processors=_processors(block, count, into.stop - into.start, product.hidden.device),
        stream=stream(product.hidden.device),
    )


def _head(call: str, product: Product) -> Any:
    """The extension's description of a product; raises ValueError for one that it cannot take."""
    hidden, weight, softcap = product.hidden, product.weight, product.softcap
    (count, depth), vocabulary = hidden.shape, weight.shape[0]
    if min(count, vocabulary) < 1 or max(count, vocabulary) > _MOST:
        raise ValueError(f"{call} takes 1 to {_MOST} rows and words; got {count} and {vocabulary}")
    for name, matrix, rows in (("hidden", hidden, count), ("weight", weight, vocabulary)):
        got = matrix.dtype, matrix.device, tuple(matrix.shape)
        if got != (torch.bfloat16, hidden.device, (rows, depth)):
            wanted = f"torch.bfloat16 [{rows}, {depth}] on {hidden.device}"
            raise ValueError(
                f"{name} of {call} must be {wanted}; got {got[0]} {got[2]} on {got[1]}"
            )
        _check_aligned(call, name, matrix)
    given: dict[str, Given] = {"bias": (product.bias, torch.bfloat16, (vocabulary,))}
    return cuda().Head(
        hidden=pointer(hidden),
        stride_hidden=hidden.stride(0),
        weight=pointer(weight),
        stride_weight=weight.stride(0),
        **check(call, hidden, given),
        **check_temperature(call, product.temperature, hidden, count),
        softcap=0.0 if softcap is None else min(max(softcap, _LEAST_CAP), _LARGEST_CAP),
        rows=count,
        depth=depth,
        vocabulary=vocabulary,
    )


def _check_aligned(call: str, name: str, matrix: Tensor) -> None:
    if (why := _why_unaligned(name, matrix)) is not None:
        raise ValueError(f"{call}: {why}")


def _tile(block: Block) -> Any:
    return cuda().Tile(**block._asdict())


def _processors(block: Block, rows: int, columns: int, where: torch.device) -> int:
    """Programs at once: one per multiprocessor; beyond all tiles where none may persist."""
    if device.persistent():
        return device.processors(where)
    return 2 * -(-rows // block.rows) * -(-columns // block.columns)
