"""`main_grad`, the caller's buffer to which backward adds the weight's gradient.

D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head import Head, check_plain


def check_main_grad(main_grad: Tensor | None, head: Head) -> None:
    """A buffer like the weight, with memory that backward does not read."""
    if main_grad is None:
        return
    check_plain("main_grad", main_grad)
    weight = head.weight
    got = tuple(main_grad.shape), main_grad.device
    wanted = tuple(weight.shape), weight.device
    if got != wanted:
        raise ValueError(
            f"main_grad must be {wanted[0]} on {wanted[1]}, like weight; got {got[0]} on {got[1]}"
        )
    if main_grad.dtype not in (torch.float32, weight.dtype):
        dtypes = " or ".join(dict.fromkeys(map(str, (torch.float32, weight.dtype))))
        raise ValueError(f"main_grad must be {dtypes}, like weight; got {main_grad.dtype}")
    if main_grad.layout != torch.strided or not main_grad.is_contiguous():
        raise ValueError(f"main_grad must be contiguous; got {_layout(main_grad)}")
    if main_grad.requires_grad:
        raise ValueError("main_grad is written to; got a tensor that requires grad")
    if not torch.compiler.is_compiling() and main_grad.is_inference():
        raise ValueError("main_grad is written to; got a tensor made under torch.inference_mode")
    if not weight.requires_grad:
        raise ValueError(
            "main_grad takes the gradient of weight; got a weight without one (frozen)"
        )
    for name in ("hidden", "weight", "target", "bias"):
        x = getattr(head, name)
        if x is not None and _overlap(main_grad, x):
            raise ValueError(f"main_grad must have memory of its own; got some of {name}'s")


def _layout(x: Tensor) -> str:
    return f"strides {x.stride()}" if x.layout == torch.strided else str(x.layout)


def _overlap(left: Tensor, right: Tensor) -> bool:
    """Whether the two share memory, from first to last value; False inside of torch.compile."""
    if torch.compiler.is_compiling() or not left.numel() or not right.numel():
        return False
    starts = left.data_ptr(), right.data_ptr()
    if 0 in starts:  # on "meta": no memory
        return False
    ends = (
        start
        + x.element_size()
        * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
        for start, x in zip(starts, (left, right), strict=True)
    )
    return max(starts) < min(ends)


class GradientInto(torch.autograd.Function):
    """The weight, whose gradient is added to `main_grad` and reaches nothing else."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.main_grad += gradient
        return None, None
