"""Matrix products by torch, and a count of the products in the kernels.

Products accumulate in fp32 whatever the inputs. The user's settings of TF32 hold for fp32 inputs.
Where torch has no fp32 products of 16-bit matrices, they are upcast: on some builds for ROCm, and
on a CPU, where kernels are interpreted.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ... import device

# fp32 copies of blocks of each operand, where these are upcast.
UPCAST_BYTES = 1 << 27

_counted = 0
# Launches whose rows a device alone knows: all rows, those left out, multiplications of each of the
# others. None until somebody asks.
_unread: list[tuple[Tensor, Tensor | None, int]] | None = None


def count(rows: Tensor, each: int, but: Tensor | None = None) -> None:
    """Adds multiplications in a kernel's products, which torch does not see: of `rows - but`, each.

    These numbers of one element are read when somebody asks, so that no launch waits for them.
    """
    # Neither a fake number nor one on "meta" has a value.
    if _unread is not None and type(rows) is Tensor and not rows.is_meta:
        _unread.append((rows, but, each))


def counting() -> bool:
    """Whether anybody has asked: what only a count needs is not computed before."""
    return _unread is not None


def counted() -> int:
    """Multiplications in the kernels' products since this was first asked: half their flops."""
    global _counted, _unread
    with _disable_current_modes():  # the numbers are real where fake ones are made too
        for rows, but, each in _unread or ():
            _counted += (int(rows) - (0 if but is None else int(but))) * each
    _unread = []
    return _counted


def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, rounded once to the dtype of `out`: fp32 or the inputs'."""
    if left.dtype == torch.float32 or (left.is_cuda and out.dtype == left.dtype):
        torch.mm(left, right, out=out)
    elif device.widens(left.device, left.dtype):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        _upcast(left, right, out)


def bmm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right for every pair of a batch, in fp32."""
    if left.dtype == torch.float32:
        torch.bmm(left, right, out=out)
    elif device.widens(left.device, left.dtype):
        torch.bmm(left, right, out_dtype=torch.float32, out=out)
    else:
        for triple in zip(left, right, out, strict=True):
            _upcast(*triple)


def add_mm(left: Tensor, right: Tensor, total: Tensor) -> bool:
    """total += left @ right, rounded once, in one pass; False where torch has none for that."""
    if total.dtype != torch.float32 or not device.adds_products(left.device, left.dtype):
        return False
    widened: dict[str, Any] = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
    torch.addmm(total, left, right, **widened, out=total)
    return True


def _upcast(left: Tensor, right: Tensor, out: Tensor) -> None:
    """mm in fp32, by blocks of rows and columns that take UPCAST_BYTES each."""
    step = max(1, UPCAST_BYTES // (4 * left.shape[1]))
    for columns, part in zip(right.split(step, 1), out.split(step, 1), strict=True):
        upcast = columns.float()
        for rows, block in zip(left.split(step), part.split(step), strict=True):
            if block.dtype == torch.float32:
                torch.mm(rows.float(), upcast, out=block)
            else:
                block.copy_(torch.mm(rows.float(), upcast))
