"""Registrations with torch.library: schema, fake, implementation, autograd. No mathematics.

`impl` names the module that computes; the public functions have resolved "auto" before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _gpu, _native, _rows
from ._ops import add_op_namespace_prefix
from ._rows import STATISTICS, ForwardRows, check_active_rows, check_values
from ._torch.linear_logprob_entropy import linear_logprob_entropy as torch_forward
from ._torch.linear_logprob_entropy_backward import (
    linear_logprob_entropy_backward as torch_backward,
)
from ._torch.ratio_loss import ratio_loss as torch_ratio_loss
from .head import Head


def _triton_forward(
    *arguments: Any, moments: Any = None, keep_above: Any = None, keep_rows: int = 0
) -> ForwardRows:
    *head, keep_logits = arguments
    return _gpu.kernels("head_forward.launch").forward(
        Head(*head),
        keep_logits=keep_logits,
        store_above=keep_above,
        store_rows=keep_rows,
        statistics=moments,
    )


def _triton_backward(*arguments: Any, **options: Any) -> Any:
    *arguments, found, needs = arguments
    backward = _gpu.kernels("head_backward.launch").backward
    return backward(tuple(arguments[:3]), Head(*arguments[3:]), found, needs, **options)


def _triton_ratio_loss(*arguments: Any) -> Any:
    return _gpu.kernels("ratio_loss.launch").ratio_loss(*arguments)


_FORWARD: dict[str, Callable[..., Any]] = {
    "torch": torch_forward,
    "cpu": _native.linear_logprob_entropy,
    "triton": _triton_forward,
}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "torch": torch_backward,
    "cpu": _native.linear_logprob_entropy_backward,
    "triton": _triton_backward,
}
_RATIO_LOSS = {
    "torch": torch_ratio_loss,
    "cpu": _native.ratio_loss,
    "triton": _triton_ratio_loss,
}


def implementations() -> tuple[str, ...]:
    """What this machine has of them; Triton's interpreter does not count. Asks for a GPU."""
    on_gpu = torch.cuda.is_available() and _gpu.why_not(torch.device("cuda")) is None
    here = {"torch": True, "cpu": _native.why_missing("cpu") is None, "triton": on_gpu}
    return tuple(name for name in _FORWARD if here[name])


def _linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    keep_logits: bool,
    max_active_rows: int | None,
    main_grad: Tensor | None,
    impl: str,
    keep_above: Tensor | None = None,
    keep_rows: int = 0,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, logsumexp; for backward max, log_sum, kept logits and their places; and
    the rows that STATISTICS names, fp32 [4, T], or an empty tensor.

    hidden [T, D], weight [V, D], target int64 [T], bias [V], temperature fp32 [1] or [T].
    max_active_rows and main_grad, [V, D], are backward's. With a keep_above, fp32 [], logits
    are those of keep_rows rows of at least that entropy, by "triton" alone.
    """
    shape = (len(STATISTICS), target.shape[0]) if statistics else (0,)
    moments = hidden.new_empty(shape, dtype=torch.float32)
    options: dict[str, Any] = {"moments": moments if statistics else None}
    if keep_above is not None:
        options |= {"keep_above": keep_above, "keep_rows": keep_rows}
    if _rows.sees_values(hidden.device):
        check_values(target, temperature, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _FORWARD[impl](
            hidden, weight, target, bias, temperature, softcap, ignore_index, keep_logits, **options
        )
    empty = hidden.new_empty(0, dtype=torch.int32)
    places = empty if found.places is None else found.places
    rows = found.logprob, found.entropy, found.logsumexp, found.max, found.log_sum
    return *rows, found.logits, places, moments


linear_logprob_entropy = torch.library.custom_op(
    add_op_namespace_prefix("linear_logprob_entropy"), _linear_logprob_entropy, mutates_args=()
)


@linear_logprob_entropy.register_fake
def _(
    hidden,
    weight,
    target,
    bias,
    temperature,
    softcap,
    ignore_index,
    keep_logits,
    max_active_rows,
    main_grad,
    impl,
    keep_above=None,
    keep_rows=0,
    statistics=False,
):
    rows = [torch.empty_like(target, dtype=torch.float32) for _ in range(5)]
    shape = target.shape[0], weight.shape[0]
    kept = _native.kept_logits(*shape) if impl == "cpu" else shape
    logits = hidden.new_empty(kept if keep_logits else (0,), dtype=torch.float32)
    places = hidden.new_empty(0, dtype=torch.int32)
    if keep_above is not None:
        logits = logits.new_empty(keep_rows, shape[1])
        places = torch.empty_like(target, dtype=torch.int32)
    moments = (len(STATISTICS), shape[0]) if statistics else (0,)
    return *rows, logits, places, hidden.new_empty(moments, dtype=torch.float32)


def gradients(
    incoming: tuple[Tensor | None, ...],
    head: tuple[Any, ...],
    found: ForwardRows,
    needs: tuple[bool, bool, bool],
    max_active_rows: int | None,
    main_grad: Tensor | None,
    impl: str,
    **more: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None for one not needed, or added to main_grad.

    head: as the op takes it, from hidden to ignore_index. `more` is for the implementation.
    """
    more |= {"main_grad": main_grad}
    if impl == "triton":
        more |= {"max_active_rows": max_active_rows}
    elif max_active_rows is not None:
        check_active_rows(incoming, head[2], head[6], max_active_rows)
    with torch.autocast(head[0].device.type, enabled=False):
        return _BACKWARD[impl](*incoming, *head, found, needs, **more)


def _linear_logprob_entropy_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    logits: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    max_active_rows: int | None,
    main_grad: Tensor | None,
    impl: str,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor stands for one that is not needed.

    Where there is a main_grad, [V, D], the weight's gradient is added to it and not returned.
    """
    dhidden, dweight, dbias = (
        hidden.new_empty(0) if gradient is None else gradient
        for gradient in gradients(
            (grad_logprob, grad_entropy, grad_logsumexp),
            (hidden, weight, target, bias, temperature, softcap, ignore_index),
            ForwardRows(entropy, entropy, entropy, max, log_sum, logits, places),
            (need_hidden, need_weight, need_bias),
            max_active_rows,
            main_grad,
            impl,
        )
    )
    return dhidden, dweight, dbias


linear_logprob_entropy_backward = torch.library.custom_op(
    add_op_namespace_prefix("linear_logprob_entropy_backward"),
    _linear_logprob_entropy_backward,
    mutates_args=("main_grad",),
)


@linear_logprob_entropy_backward.register_fake
def _(*args):
    hidden, weight, bias = args[3], args[4], args[6]
    need_hidden, need_weight, need_bias = args[14:17]
    need_weight = need_weight and args[18] is None
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (
        dhidden if need_hidden else hidden.new_empty(0),
        dweight if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, target, bias, temperature, softcap, ignore_index, _, *options = inputs
    *options, keep_above, _, _ = options
    _, entropy, _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    *others, places, _ = others
    places = None if keep_above is None else places
    ctx.save_for_backward(hidden, weight, target, bias, temperature, entropy, *others, places)
    ctx.head, ctx.options = (softcap, ignore_index), options


def _backward(ctx, grad_logprob, grad_entropy, grad_logsumexp, *_):
    *inputs, entropy, row_max, log_sum, logits, places = ctx.saved_tensors
    hidden, weight, target, bias, temperature = inputs
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dhidden, dweight, dbias = linear_logprob_entropy_backward(
        grad_logprob,
        grad_entropy,
        grad_logsumexp,
        hidden,
        weight,
        target,
        bias,
        temperature,
        *ctx.head,
        entropy,
        row_max,
        log_sum,
        logits,
        need_hidden,
        need_weight,
        need_bias,
        *ctx.options,
        places,
    )
    in_main_grad = ctx.options[1] is not None
    return (
        dhidden if need_hidden else None,
        dweight if need_weight and not in_main_grad else None,
        None,
        dbias if need_bias else None,
        *[None] * 10,
    )


linear_logprob_entropy.register_autograd(_backward, setup_context=_setup_context)


def _ratio_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    kept: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_bound: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, its gradient with respect to logprob, and what metrics need: sums [4], counts [3].

    logprob, old_logprob, advantage [B, L], fp32, with impl "torch" also fp64; kept bool [B, L];
    weight [B], what the losses of a sequence's tokens are multiplied with.
    """
    return _RATIO_LOSS[impl](
        logprob,
        old_logprob,
        advantage,
        kept,
        weight,
        clip_low,
        clip_high,
        dual_clip,
        log_ratio_bound,
    )


ratio_loss = torch.library.custom_op(
    add_op_namespace_prefix("ratio_loss"), _ratio_loss, mutates_args=()
)


@ratio_loss.register_fake
def _(logprob, *_):
    grad = torch.empty_like(logprob, memory_format=torch.contiguous_format)
    counts = logprob.new_empty(3, dtype=torch.int64)
    return logprob.new_empty(()), grad, logprob.new_empty(4), counts


def _ratio_loss_context(ctx, inputs, output) -> None:
    _, grad, sums, counts = output
    ctx.mark_non_differentiable(grad, sums, counts)
    ctx.save_for_backward(grad)


def _ratio_loss_backward(ctx, grad_loss, *_):
    (grad,) = ctx.saved_tensors
    return grad * grad_loss, *[None] * 9


ratio_loss.register_autograd(_ratio_loss_backward, setup_context=_ratio_loss_context)

# What runs behind each registered name, for those who watch it from inside.
BODIES: dict[str, Callable[..., Any]] = {
    "linear_logprob_entropy": _linear_logprob_entropy,
    "linear_logprob_entropy_backward": _linear_logprob_entropy_backward,
    "ratio_loss": _ratio_loss,
}
