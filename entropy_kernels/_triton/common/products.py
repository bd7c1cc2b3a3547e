"""Matrix products: those of the kernels counted, and those of backward by torch.

They accumulate in fp32 whatever the inputs.

Only mm and bmm with `out_dtype`: addmm takes an fp32 addend of 16-bit products from torch 2.12 on.
The user's settings of TF32 hold for fp32 inputs. A CPU, where the kernels are interpreted, has no
fp32 products of 16-bit matrices: it upcasts them.
"""

import torch
from torch import Tensor

_counted = 0


def count(more: int) -> None:
    """Adds the multiplications of a kernel's products, which torch does not see."""
    global _counted
    _counted += more


def counted() -> int:
    """Multiplications in the kernels' products since they were loaded: half their flops."""
    return _counted


def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, rounded once to the dtype of `out`: fp32, or that of the inputs."""
    if left.device.type == "cpu" and left.dtype != torch.float32:
        out.copy_(torch.mm(left.float(), right.float()))
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def bmm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """The same of every pair of a batch, into fp32."""
    if left.dtype == torch.float32:
        torch.bmm(left, right, out=out)
    elif left.device.type == "cpu":
        torch.bmm(left.float(), right.float(), out=out)
    else:
        torch.bmm(left, right, out_dtype=torch.float32, out=out)
