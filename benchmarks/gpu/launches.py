"""What one step of ours launches: the real launchers run on tensors without values, and are noted.

T tokens, C active rows, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from entropy_kernels import backends, device
from entropy_kernels._cuda_kernels import head as cuda_head
from entropy_kernels._cuda_kernels import merge as cuda_merge
from entropy_kernels._cuda_kernels.head import Block, Gradients, Product, Rows
from entropy_kernels._rows import ForwardRows
from entropy_kernels._triton.common import choice
from entropy_kernels._triton.head_backward.launch import backward
from entropy_kernels._triton.head_forward.launch import forward
from entropy_kernels.head import Head

# Rows that share the columns that csrc/cuda's kernels have at a time: kGroup of tile_order.h.
_GROUP_ROWS = 16 * 128


class Launch(NamedTuple):
    """One launch.

    kernel: ours, or torch's op.
    moved: bytes to and from memory, if each of a tensor's is moved once.
    product: rows, columns and depth of a matrix product; None for another launch.
    constants: of a kernel of ours with a product, its constants and options.
    """

    kernel: str
    moved: float
    product: tuple[int, int, int] | None = None
    constants: dict[str, Any] | None = None


class Shape(NamedTuple):
    """What a step runs on; `processors` are multiprocessors."""

    architecture: str
    processors: int
    tokens: int
    hidden: int
    vocabulary: int
    active: int


def forward_of(
    shape: Shape,
    *,
    softcap: bool = False,
    statistics: bool = False,
    keep_logits: bool = False,
    impl: str = "triton",
) -> list[Launch]:
    """Forward alone, of all tokens; impl: "triton", or "cuda" for csrc/cuda's where it has them."""
    filled = _empty(4 if impl == "cuda" else 6, shape.tokens) if statistics else None
    with _noted(shape) as found:
        forward(_head(shape, softcap), keep_logits=keep_logits, statistics=filled, impl=impl)
    return found


def backward_of(
    shape: Shape, *, softcap: bool = False, entropy: bool = False, keep_logits: bool = False
) -> list[Launch]:
    """Backward alone, of the active tokens; `entropy`, whether it has a gradient too."""
    row = _empty(shape.tokens)
    logits = _empty(shape.tokens, shape.vocabulary) if keep_logits else _empty(0)
    rows = ForwardRows.for_backward(row, row, row, logits)
    with _noted(shape) as found:
        _backward(shape, _head(shape, softcap), rows, row if entropy else None)
    return found


def step_of(shape: Shape, way: str, impl: str = "triton") -> list[Launch]:
    """Forward and backward, without selection and loss.

    way: "0.2", the rows are chosen by their entropies; "threshold", those above one known
        beforehand, their logits stored; "recomputed", the same without; "known", a mask.
    """
    fitting = backends.STORED_LOGITS_BYTES["cuda"] // (4 * shape.vocabulary)
    if way == "known":
        shape = shape._replace(tokens=shape.active)
    head, all_fit = _head(shape, softcap=False), shape.active <= fitting
    with _noted(shape):
        pays = choice.stores_rows(head.hidden.device, head.hidden.dtype, shape.hidden)
    stored: dict[str, Any] = {"keep_logits": way == "known" and all_fit}
    if way == "threshold" or (way == "known" and not all_fit and pays):
        stored |= {"store_above": _empty(), "store_rows": min(fitting, shape.active)}
    with _noted(shape, stored.get("store_rows", 0)) as found:
        kept = forward(head, **stored, impl=impl)
        _backward(shape, head, kept, None, impl)
    return found


def _backward(
    shape: Shape, head: Head, rows: ForwardRows, entropy: Tensor | None, impl: str = "triton"
) -> None:
    gradients, needs = (_empty(shape.tokens), entropy, None), (True, True, False)
    backward(gradients, head, rows, needs, max_active_rows=shape.active, impl=impl)


@contextmanager
def _noted(shape: Shape, stored: int = 0) -> Iterator[list[Launch]]:
    """The launches inside; no kernel of ours runs. Of `stored` active rows the logits are there."""
    found: list[Launch] = []

    def note(self: Any, *args: Any, **options: Any) -> None:
        names = inspect.signature(self.fn).parameters
        options = {k: v for k, v in options.items() if k not in ("grid", "warmup")}
        given = dict(zip(names, args, strict=False)) | options
        found.append(_launch(self.fn.__name__, given, stored))

    with (
        patch.object(JITFunction, "run", note),
        patch.object(GridExecutor, "__call__", note),
        patch.object(device, "architecture", lambda device: shape.architecture),
        patch.object(device, "processors", lambda device: shape.processors),
        # It would try a product, once per process.
        patch.object(device, "widens", lambda device, dtype: True),
        _cuda_noted(found, stored),
        _Ops(found),
    ):
        yield found


@contextmanager
def _cuda_noted(found: list[Launch], stored: int) -> Iterator[None]:
    """The launches of csrc/cuda, which need not be built."""

    def forward(block: Block, product: Product, rows: Rows) -> None:
        sizes = (*product.hidden.shape, product.weight.shape[0])
        written = sum(map(_bytes, _tensors((rows.partials, rows.logits))))
        found.append(_of_cuda("forward", block, sizes, written, STATISTICS=len(rows.partials) > 4))

    def dlogits(block: Block, product: Product, into: Gradients) -> None:
        rows, columns = len(product.hidden) - stored, into.stop - into.start
        sizes = rows, product.hidden.shape[1], columns
        found.append(_of_cuda("dlogits", block, sizes, 2 * rows * columns))

    def merge(*given: Any) -> None:
        found.append(Launch("merge_kernel", sum(map(_bytes, _tensors(given)))))

    def splits(block: Block, vocabulary: int) -> int:
        return -(-vocabulary // block.columns)

    with (
        patch.multiple(
            cuda_head,
            forward=forward,
            dlogits=dlogits,
            splits=splits,
            bias_rows=lambda: 16,
            why_missing=lambda: None,
            architectures=lambda: ("80", "90a", "100a"),
        ),
        patch.object(cuda_merge, "merge", merge),
        # Once per process it would say what csrc/cuda does not have.
        patch.object(choice, "tell_of_triton", lambda *given: None),
    ):
        yield


def _of_cuda(
    op: str, block: Block, sizes: tuple[int, int, int], written: float, **flags: bool
) -> Launch:
    """sizes: rows, depth and columns of the product."""
    rows, depth, columns = sizes
    reads = -(-rows // _GROUP_ROWS)
    moved = 2 * depth * (rows + reads * columns) + written
    # On sm_100 two multiprocessors share the rows of a tile.
    block_t = block.rows // (2 if block.architecture == 100 else 1)
    constants = {"BLOCK_T": block_t, "BLOCK_V": block.columns, "BLOCK_D": block.depth, **flags}
    return Launch(f"{op}_cutlass_kernel", moved, (rows, columns, depth), constants)


class _Ops(TorchDispatchMode):
    """Notes torch's own launches."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            return result
        tensors = _tensors((args, kwargs, result))
        moved = sum(_bytes(x) for x in {id(x): x for x in tensors}.values())
        product = None
        if name in ("mm", "bmm", "addmm"):
            left, right = [x for x in _tensors(args) if x.ndim > 1][-2:]
            product = left.shape[:-1].numel(), right.shape[-1], left.shape[-1]
        self._found.append(Launch(name, moved, product))
        return result


def _launch(name: str, given: dict[str, Any], stored: int) -> Launch:
    if not name.endswith(("_tma_kernel", "_pointer_kernel")):
        return Launch(name, _MOVED.get(name, _all)(given))
    is_forward = name.startswith("forward")
    rows = given["T"] if is_forward else given["capacity"] - stored
    columns = given["V"] if is_forward else given["stop"] - given["start"]
    group = given["GROUP_T" if is_forward else "GROUP_C"]
    block = given["BLOCK_T" if is_forward else "BLOCK_C"]
    # The weight is read once by all blocks of rows that run at the same time.
    reads = -(-rows // (group * block))
    depth = given["D"]
    written = _bytes(given["partials_ptr"]) if is_forward else 2 * rows * columns
    written += 4 * rows * columns * bool(given.get("STORE_LOGITS"))
    moved = 2 * depth * (rows + reads * columns) + written
    return Launch(name, moved, (rows, columns, depth), given)


def _all(given: dict[str, Any]) -> float:
    return sum(_bytes(x) for x in _tensors(given))


def _gather(given: dict[str, Any]) -> float:
    """Only the active rows of the hidden states are read."""
    return _all(given) - _bytes(given["hidden_ptr"]) + _bytes(given["out_hidden_ptr"])


def _target_logits(given: dict[str, Any]) -> float:
    """A row of the weight per token."""
    return 2 * _bytes(given["hidden_ptr"])


def _merge(given: dict[str, Any]) -> float:
    return _all(given) * (given["end_t"] - given["first_t"]) / given["T"]


def _sums(given: dict[str, Any]) -> float:
    """Only the partial sums of this chunk's rows are written."""
    share = (given["end_t"] - given["first_t"]) / given["T"]
    return _bytes(given["logits_ptr"]) + share * _bytes(given["partials_ptr"])


def _copy_rows(given: dict[str, Any]) -> float:
    """The rows that are stored lie evenly among all."""
    places = given["places_ptr"]
    share = _bytes(places) / places.untyped_storage().nbytes()
    return 2 * share * _bytes(given["out_ptr"])


def _read(given: dict[str, Any]) -> float:
    """fp32 logits in, their 16-bit gradient out; of the rows that are stored."""
    rows = min(given["capacity"], given["logits_ptr"].shape[0])
    return 6 * rows * (given["stop"] - given["start"])


# What moves fewer bytes than its tensors have.
_MOVED: dict[str, Callable[[dict[str, Any]], float]] = {
    "gather_kernel": _gather,
    "target_logit_kernel": _target_logits,
    "merge_kernel": _merge,
    "forward_cublas_kernel": _sums,
    "copy_rows_kernel": _copy_rows,
    "dlogits_read_kernel": _read,
}


def _tensors(tree: Any) -> list[Tensor]:
    leaves = tree_leaves(tree)
    return [getattr(x, "base", x) for x in leaves if isinstance(getattr(x, "base", x), Tensor)]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _head(shape: Shape, softcap: bool) -> Head:
    return Head(
        _empty(shape.tokens, shape.hidden, dtype=torch.bfloat16),
        _empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16),
        _empty(shape.tokens, dtype=torch.int64),
        temperature=None,
        softcap=30.0 if softcap else None,
    )
