"""Registrations with torch.library: schema, fake, implementation, autograd. No mathematics.

The head is one value (head.py) everywhere but in the schemas here, which list its fields. `impl`
names a backend (backends.py); the public functions of the head and the loss have resolved "auto".
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import _native, _rows, backends
from ._cuda_kernels import selection as cuda_selection
from ._ops import add_op_namespace_prefix
from ._rows import ForwardRows, check_values, statistics_shape
from ._torch.selection import exact_share
from .head import Head


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
    store_above: Tensor | None = None,
    store_rows: int = 0,
    statistics_wanted: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, logsumexp; max, log_sum, stored logits and their places, for backward;
    and the first statistics_wanted statistics, fp32 [S, T], or an empty tensor.

    The head is flat. max_active_rows and main_grad, [V, D], are backward's. With store_above, a
    fp32 [], "triton" stores the logits of store_rows rows of at least that entropy.
    """
    head = Head(hidden, weight, target, bias, temperature, softcap, ignore_index)
    shape = statistics_shape(impl, statistics_wanted, target.shape[0])
    statistics = hidden.new_empty(shape, dtype=torch.float32)
    if _rows.sees_values(hidden.device):
        check_values(head, weight.shape[0])
    rows = backends.forward(
        impl,
        head,
        keep_logits=keep_logits,
        store_above=store_above,
        store_rows=store_rows,
        statistics=statistics if statistics_wanted else None,
    )
    empty = hidden.new_empty(0, dtype=torch.int32)
    places = empty if rows.places is None else rows.places
    return *rows[:5], rows.logits, places, statistics


linear_logprob_entropy = torch.library.custom_op(
    add_op_namespace_prefix("linear_logprob_entropy"), _linear_logprob_entropy, mutates_args=()
)
# The names of the op's arguments, and of those that are the head's fields.
_ARGUMENTS = tuple(inspect.signature(_linear_logprob_entropy).parameters)
_HEAD = tuple(field.name for field in fields(Head) if field.name in _ARGUMENTS)


def in_schema(head: Head) -> dict[str, Any]:
    """A flat head as the ops' arguments."""
    return {name: getattr(head, name) for name in _HEAD}


def _given(body: Callable[..., Any], arguments: Any, named: Any) -> dict[str, Any]:
    """The arguments of an op by their names, with its defaults."""
    bound = inspect.signature(body).bind(*arguments, **named)
    bound.apply_defaults()
    return bound.arguments


@linear_logprob_entropy.register_fake
def _(*arguments, **named):
    given = _given(_linear_logprob_entropy, arguments, named)
    hidden, target, impl = given["hidden"], given["target"], given["impl"]
    rows = [torch.empty_like(target, dtype=torch.float32) for _ in range(5)]
    shape = target.shape[0], given["weight"].shape[0]
    all_rows = _native.stored_shape(*shape) if impl == "cpu" else shape
    logits = hidden.new_empty(all_rows if given["keep_logits"] else (0,), dtype=torch.float32)
    places = hidden.new_empty(0, dtype=torch.int32)
    if given["store_above"] is not None:
        logits = logits.new_empty(given["store_rows"], shape[1])
        places = torch.empty_like(target, dtype=torch.int32)
    statistics = statistics_shape(impl, given["statistics_wanted"], shape[0])
    return *rows, logits, places, hidden.new_empty(statistics, dtype=torch.float32)


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
        for gradient in backends.backward(
            impl,
            (grad_logprob, grad_entropy, grad_logsumexp),
            Head(hidden, weight, target, bias, temperature, softcap, ignore_index),
            ForwardRows.for_backward(entropy, max, log_sum, logits, places),
            (need_hidden, need_weight, need_bias),
            max_active_rows=max_active_rows,
            main_grad=main_grad,
        )
    )
    return dhidden, dweight, dbias


linear_logprob_entropy_backward = torch.library.custom_op(
    add_op_namespace_prefix("linear_logprob_entropy_backward"),
    _linear_logprob_entropy_backward,
    mutates_args=("main_grad",),
)


@linear_logprob_entropy_backward.register_fake
def _(*arguments, **named):
    given = _given(_linear_logprob_entropy_backward, arguments, named)
    hidden, weight, bias = given["hidden"], given["weight"], given["bias"]
    need_weight = given["need_weight"] and given["main_grad"] is None
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (
        dhidden if given["need_hidden"] else hidden.new_empty(0),
        dweight if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if given["need_bias"] else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    given = dict(zip(_ARGUMENTS, inputs, strict=True))
    _, entropy, _, row_max, log_sum, logits, places, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum, logits, places, statistics)
    places = None if given["store_above"] is None else places
    tensors, ctx.head_options = Head(**{name: given[name] for name in _HEAD}).split()
    ctx.save_for_backward(entropy, row_max, log_sum, logits, places, *tensors)
    ctx.options = {name: given[name] for name in ("max_active_rows", "main_grad", "impl")}


def _backward(ctx, grad_logprob, grad_entropy, grad_logsumexp, *_):
    entropy, row_max, log_sum, logits, places, *tensors = ctx.saved_tensors
    # Trailing arguments that have their default are left out; none of them gets a gradient.
    needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=False))
    dhidden, dweight, dbias = linear_logprob_entropy_backward(
        grad_logprob,
        grad_entropy,
        grad_logsumexp,
        **in_schema(Head.joined(tensors, ctx.head_options)),
        entropy=entropy,
        max=row_max,
        log_sum=log_sum,
        logits=logits,
        need_hidden=needs["hidden"],
        need_weight=needs["weight"],
        need_bias=needs["bias"],
        **ctx.options,
        places=places,
    )
    return _in_order(
        _linear_logprob_entropy,
        hidden=dhidden if needs["hidden"] else None,
        weight=dweight if needs["weight"] and ctx.options["main_grad"] is None else None,
        bias=dbias if needs["bias"] else None,
    )


def _in_order(body: Callable[..., Any], **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in the order of an op's arguments; None for those that are not named."""
    return tuple(gradients.get(name) for name in inspect.signature(body).parameters)


linear_logprob_entropy.register_autograd(_backward, setup_context=_setup_context)


def _ratio_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    selected: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_bound: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, its gradient with respect to logprob, and what metrics need: sums [4], counts [3].

    logprob, old_logprob, advantage [B, L], fp32, with impl "torch" also fp64; selected bool [B, L];
    weight [B] multiplies the losses of a sequence's tokens.
    """
    tokens = logprob, old_logprob, advantage, selected, weight
    return backends.ratio_loss(impl)(*tokens, clip_low, clip_high, dual_clip, log_ratio_bound)


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
    return _in_order(_ratio_loss, logprob=grad * grad_loss)


ratio_loss.register_autograd(_ratio_loss_backward, setup_context=_ratio_loss_context)


@torch.library.custom_op(add_op_namespace_prefix("radix_histogram"), mutates_args=())
def radix_histogram(
    values: Tensor,
    mask: Tensor | None,
    prefix: Tensor,
    shift: int,
    bits: int,
    prefix_bits: int,
    impl: str = "auto",
) -> Tensor:
    """How many valid values have each digit, among those whose key begins with `prefix`.

    values: fp32 [N]; mask: bool [N] or None; prefix: 0-dim int64, the highest `prefix_bits` of the
    key; the digit is the `bits` of the key above its lowest `shift`. Returns int64 [1 << bits].
    Integer sums: the same counts every time. Works in slices of bounded memory.
    """
    return backends.radix_histogram(impl, values, mask, prefix, shift, bits, prefix_bits)


@radix_histogram.register_fake
def _(values, mask, prefix, shift, bits, prefix_bits, impl="auto"):
    return values.new_empty(1 << bits, dtype=torch.int64)


@torch.library.custom_op(add_op_namespace_prefix("radix_pick"), mutates_args=())
def radix_pick(
    counts: Tensor,
    local: Tensor,
    prefix: Tensor,
    remaining: Tensor | None,
    fraction: float,
    shift: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digit in which the k-th largest falls, of the histogram of the digit above `shift`.

    counts, local: int64 [1 << bits], the histogram over all ranks and this rank's. prefix: 0-dim
    int64, the digits found before. remaining: 0-dim int64, the rank k among the counted, or None
    for k = ceil(fraction * n) of all n counted.

    Returns 0-dim: the prefix with this digit, the rank k within it, and the number on this rank
    that share it, all int64. The last is the least value that shares it, fp32, +inf where n = 0.
    """
    given = counts, local, prefix, remaining, exact_share(fraction), shift
    return backends.selection(impl, counts.device).radix_pick(*given)


@radix_pick.register_fake
def _(counts, local, prefix, remaining, fraction, shift, impl="auto"):
    numbers = [torch.empty_like(prefix) for _ in range(3)]
    return *numbers, torch.empty_like(prefix, dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("select_largest"), mutates_args=())
def select_largest(
    values: Tensor, mask: Tensor | None, threshold: Tensor, quota: Tensor, impl: str = "auto"
) -> Tensor:
    """The valid values above `threshold` and the first `quota` of those equal to it.

    values: fp32 [N]; mask: bool [N] or None; threshold: 0-dim fp32; quota: 0-dim int64. Returns
    bool [N]. NaN equals NaN and is above every number.
    """
    return backends.selection(impl, values.device).select_largest(values, mask, threshold, quota)


@select_largest.register_fake
def _(values, mask, threshold, quota, impl="auto"):
    return torch.empty_like(values, dtype=torch.bool)


@torch.library.custom_op(add_op_namespace_prefix("top"), mutates_args=())
def top(
    values: Tensor, mask: Tensor | None, fraction: float, select: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k = max(1, ceil(fraction * n)) largest of n valid values, in one launch of csrc/cuda.

    values: fp32 [N], as few as `backends.in_one_block` takes; mask: bool [N] or None. Returns the
    three numbers of `_radix.KthLargest` and, bool [N], the mask of `select_largest`; without
    `select` it is empty.
    """
    return cuda_selection.top(values, mask, exact_share(fraction), select)


@top.register_fake
def _(values, mask, fraction, select):
    numbers = [values.new_empty((), dtype=torch.int64) for _ in range(2)]
    selected = torch.empty_like(values if select else values[:0], dtype=torch.bool)
    return values.new_empty(()), *numbers, selected


# What runs behind each registered name, for those who watch it from inside.
BODIES: dict[str, Callable[..., Any]] = {
    "linear_logprob_entropy": _linear_logprob_entropy,
    "linear_logprob_entropy_backward": _linear_logprob_entropy_backward,
    "ratio_loss": _ratio_loss,
}
