"""Blocks of logits: their sizes, their products, and what both directions share.

T tokens (or R active rows), D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# (rows, vocabulary) of one block of logits.
_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
# exp of less is subnormal in fp32: nothing to a sum that holds a 1, and ten times slower on a CPU.
LOWEST_EXPONENT = -87.0
# In fp32 torch.mm is MKL, at half the speed of oneDNN on AMD's processors; over short sums the
# faster one.
ONEDNN_LEAST = 128
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


class Head(NamedTuple):
    """What turns rows of hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, v: slice) -> Tensor:
        """fp32 logits h W^T + b of the columns `v`, whose `weight` has its compute dtype."""
        z = product(compute_dtype(hidden), weight.T)
        if self.bias_V is not None:
            z += self.bias_V[v]
        return z

    def cap(self, z: Tensor) -> Tensor:
        """softcap * tanh(z / softcap), in place."""
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)


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
    """`length` cut into pieces of `block`, the last one shorter."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def compute_dtype(x: Tensor) -> Tensor:
    """fp32; but 16-bit inputs stay as they are on CUDA, where torch.mm can return fp32 logits."""
    return x if x.is_cuda else x.float()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, fp32."""
    if left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.is_cuda or not _HAS_ONEDNN or left.shape[1] < ONEDNN_LEAST:
        return torch.mm(left, right)
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


def target_column(target: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the block `v`, clamped into it, [T, 1]; and whether it lies there."""
    inside = (target >= v.start) & (target < v.stop)
    return (target - v.start).clamp(0, v.stop - v.start - 1).unsqueeze(1), inside


def at(x: Tensor | None, index: Tensor | slice) -> Tensor | None:
    """x[index], or None."""
    return None if x is None else x[index]
