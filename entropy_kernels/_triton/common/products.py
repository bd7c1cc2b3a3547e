"""Matrix products by torch, and a count of the products in the kernels.

Products accumulate in fp32 whatever the inputs. The user's settings of TF32 hold for fp32 inputs.
Only mm and bmm are used: addmm takes an fp32 addend of 16-bit products from torch 2.12 on. A CPU,
where kernels are interpreted, has no fp32 products of 16-bit matrices: these are upcast there.
"""

import torch
from torch import Tensor

_counted = 0


def count(more: int) -> None:
    """Adds multiplications in a kernel's products, which torch does not see."""
    global _counted
    _counted += more


def counted() -> int:
    """Multiplications in the kernels' products since this file was loaded: half their flops."""
    return _counted


def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, rounded once to the dtype of `out`: fp32 or the inputs'."""
    if left.device.type == "cpu" and left.dtype != torch.float32:
        out.copy_(torch.mm(left.float(), right.float()))
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def bmm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right for every pair of a batch, in fp32."""
    if left.dtype == torch.float32:
        torch.bmm(left, right, out=out)
    elif left.device.type == "cpu":
        torch.bmm(left.float(), right.float(), out=out)
    else:
        torch.bmm(left, right, out_dtype=torch.float32, out=out)
