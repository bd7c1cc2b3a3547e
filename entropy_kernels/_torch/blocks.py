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


class Head(NamedTuple):
    """What turns rows of hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, v: slice, buffer: Tensor) -> Tensor:
        """fp32 logits h W^T + b of the columns `v`.

        `weight` is `weight_VD[v]` in its compute dtype; `buffer` holds the result where it can.
        """
        hidden = compute_dtype(hidden)
        if hidden.dtype == torch.float32:
            z = torch.mm(hidden, weight.T, out=view(buffer, hidden.shape[0], weight.shape[0]))
        else:
            z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if self.bias_V is not None:
            z += self.bias_V[v]
        return z

    def cap(self, z: Tensor) -> Tensor:
        """softcap * tanh(z / softcap), in place."""
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)


class Statistics(NamedTuple):
    """What forward knows of each row, all fp32 [T]; and h W^T + b [T, V], or empty if not kept.

    Backward takes the log-sum-exp as two floats, (max, log_sum): at |z| = 6e3 their rounded sum
    alone would cost the gradient 25 times its error.
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    max: Tensor
    log_sum: Tensor
    logits: Tensor


def sizes(x: Tensor) -> tuple[int, int]:
    """Rows and vocabulary of a block on the device of `x`."""
    return _SIZES["cuda" if x.is_cuda else "cpu"]


def buffers(count: int, vocabulary: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two fp32 workspaces of one block each."""
    block_t, block_v = sizes(like)
    size = min(block_t, count) * min(block_v, vocabulary)
    empty = like.new_empty(0, dtype=torch.float32)
    return empty.new_empty(size), empty.new_empty(size)


def view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The head of `buffer` as a [rows, columns] block."""
    return buffer[: rows * columns].view(rows, columns)


def slices(length: int, block: int) -> list[slice]:
    """`length` cut into pieces of `block`, the last one shorter."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def compute_dtype(x: Tensor) -> Tensor:
    """fp32; but 16-bit inputs stay as they are on CUDA, where torch.mm can return fp32 logits."""
    return x if x.is_cuda else x.float()


def add_product(accumulator: Tensor, left: Tensor, right: Tensor) -> None:
    """accumulator += left @ right, in fp32."""
    if left.dtype == torch.float32:
        accumulator.addmm_(left, right)
    else:
        accumulator += torch.mm(left, right, out_dtype=torch.float32)


def target_column(target: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the block `v`, clamped into it, [T, 1]; and whether it lies there."""
    inside = (target >= v.start) & (target < v.stop)
    return (target - v.start).clamp(0, v.stop - v.start - 1).unsqueeze(1), inside


def per_row(temperature: Tensor | None, target_T: Tensor) -> Tensor | None:
    """The temperature of every row; None stands for 1."""
    return None if temperature is None else temperature.float().expand(target_T.shape)


def at(x: Tensor | None, index: Tensor | slice) -> Tensor | None:
    """x[index], or None."""
    return None if x is None else x[index]
