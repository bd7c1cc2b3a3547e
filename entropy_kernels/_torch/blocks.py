"""Blocks of logits: their sizes, their products, and what both directions share.

T tokens (or R active rows), D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from .. import device
from ..head import Head

# (rows, vocabulary) of one block of logits. On a GPU a block exceeds its L2 cache: forward launches
# 58 operations per block, and for blocks that fit the host would take longer than the memory.
_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
# Below this exponent exp is subnormal in fp32: it adds nothing to a sum that holds a 1, and is ten
# times slower on a CPU.
LOWEST_EXPONENT = -87.0
# At this one exp is 0 in fp32.
EXPONENT_OF_ZERO = -105.0
# In fp32 torch.mm runs MKL, which has half the speed of oneDNN on AMD's processors. MKL is faster
# where a sum has fewer terms than this.
ONEDNN_LEAST = 128
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def sizes(x: Tensor) -> tuple[int, int]:
    """Rows and vocabulary of a block on the device of `x`."""
    return _SIZES["cuda" if x.is_cuda else "cpu"]


def workspace(count: int, vocabulary: int, like: Tensor) -> Tensor:
    """Room for one block, fp32."""
    block_t, block_v = sizes(like)
    size = min(block_t, count) * min(block_v, vocabulary)
    return torch.empty(size, dtype=torch.float32, device=like.device)


def view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The head of `buffer` as a [rows, columns] block."""
    return buffer[: rows * columns].view(rows, columns)


def slices(length: int, block: int) -> list[slice]:
    """Pieces of `block` that cover `length`; the last one may be shorter."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def compute_dtype(x: Tensor) -> Tensor:
    """fp32; but 16-bit inputs stay as they are on a GPU where torch.mm can return fp32 logits."""
    return x if x.is_cuda and device.widens(x.device, x.dtype) else x.float()


def few_passes(x: Tensor) -> bool:
    """Whether memory traffic is what a block costs, more than its logarithms: on a GPU."""
    return x.is_cuda


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fp32."""
    if left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.is_cuda or not _HAS_ONEDNN or left.shape[1] < ONEDNN_LEAST:
        return torch.mm(left, right)
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


def logits(hidden: Tensor, weight: Tensor, head: Head, v: slice) -> Tensor:
    """fp32 logits h W^T + b of the columns `v`, from their `weight` in its compute dtype."""
    z = product(compute_dtype(hidden), weight.T)
    if head.bias is not None:
        z += head.bias[v]
    return z


def target_column(target: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the block `v`, clamped into it, [T, 1]; and whether it lies there."""
    inside = (target >= v.start) & (target < v.stop)
    return (target - v.start).clamp(0, v.stop - v.start - 1).unsqueeze(1), inside


def at(x: Tensor | None, index: Tensor | slice) -> Tensor | None:
    """x[index], or None."""
    return None if x is None else x[index]
