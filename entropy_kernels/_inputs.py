"""What a caller can get wrong, said before the op runs; and what its inputs become for it.

T tokens, D hidden, V vocabulary.
"""

import functools
import math
import operator
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from . import _gpu, _native, ops
from ._arguments import (
    check_choice,
    check_flag,
    check_fraction,
    check_group,
    check_number,
    check_tensor,
    check_whole,
    is_number,
    shown,
)
from ._compiler import constant

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = ("auto", "reference", "torch", "cpu", "triton")


def check_impl(impl: object) -> None:
    """A name; whether it can run shows where the tensors are."""
    check_choice("impl", impl, _NAMES)


def resolve(impl: str, device: torch.device) -> str:
    """The implementation that "auto" stands for."""
    check_impl(impl)
    no_cpu = _native.why_missing("cpu")
    if impl == "auto":
        name = "cpu" if device.type == "cpu" and no_cpu is None else "torch"
        name = "triton" if _gpu.verified(device) else name
        if name == "torch":
            _warn_of_the_torch_path(device)
        return name
    if impl == "cpu" and no_cpu is not None:
        raise ValueError(f'impl="cpu" is missing: {no_cpu}')
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f'impl="cpu" needs tensors on the CPU; got {device}')
    if impl == "triton" and (why := _gpu.why_not(device)) is not None:
        raise ValueError(f'impl="triton" cannot run: {why}')
    return impl


def why_torch(device: torch.device) -> str:
    """Why "auto" stands for the torch path there. The caller knows that it does."""
    if device.type == "cpu":
        return str(_native.why_missing("cpu"))
    return _gpu.why_not(device) or (
        f"the Triton kernels have no recorded correctness run on {_gpu.architecture(device)}; "
        'impl="triton" takes them'
    )


@constant
@functools.cache
def _warn_of_the_torch_path(device: torch.device) -> None:
    warnings.warn(
        f"linear_logprob_entropy takes the torch path, which is slower: {why_torch(device)}",
        RuntimeWarning,
        stacklevel=4,
    )


def cast_as_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, what `linear` would multiply; else what came."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_statistics(names: Collection[str]) -> None:
    """Names out of ops.STATISTICS; one bare name is none of them."""
    several = isinstance(names, Collection) and not isinstance(names, (str, Tensor))
    if not several or not all(isinstance(name, str) and name in ops.STATISTICS for name in names):
        known = ", ".join(ops.STATISTICS)
        got = repr(names) if several else shown(names)
        raise ValueError(f"statistics must be a collection of names out of {known}; got {got}")


def check_temperature(temperature: float | Tensor, target: Tensor | None = None) -> None:
    """A number, or a tensor of one value or one a token; its values are checked by the op."""
    if not isinstance(temperature, Tensor):
        finite = "a tensor, or finite and > 0"
        check_number("temperature", temperature, finite, lambda x: 0 < x < math.inf)
        return
    check_tensor("temperature", temperature, "floating-point")
    if temperature.requires_grad:
        raise ValueError("temperature is not differentiated; got a tensor that requires grad")
    if target is None:
        return
    if temperature.device != target.device:
        raise ValueError(
            f"temperature must be on {target.device}, like target; got {temperature.device}"
        )
    if temperature.numel() != 1 and temperature.shape != target.shape:
        raise ValueError(
            f"temperature must be one value or have target's shape {tuple(target.shape)}; "
            f"got {tuple(temperature.shape)}"
        )


def per_token_temperature(temperature: float | Tensor, target: Tensor) -> Tensor | None:
    """fp32 [1] or [T]; None for 1."""
    check_temperature(temperature, target)
    if isinstance(temperature, Tensor):
        return temperature.detach().reshape(-1).float()
    if temperature == 1:
        return None
    return torch.full((1,), float(temperature), dtype=torch.float32, device=target.device)


def check_head_options(
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_group: object = None,
    keep_logits: bool = False,
    max_active_rows: int | None = None,
    impl: str = "auto",
) -> None:
    """Each option of the head by itself."""
    if softcap is not None:
        wanted = "finite and > 0 or None"
        check_number("softcap", softcap, wanted, lambda x: 0 < x < math.inf)
    check_whole("ignore_index", ignore_index)
    check_group("vocab_group", vocab_group)
    check_flag("keep_logits", keep_logits)
    if max_active_rows is not None:
        check_whole("max_active_rows", max_active_rows, 0, "an int >= 0 or None")
    check_impl(impl)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    main_grad: Tensor | None,
    sharded: bool,
) -> None:
    """Types, shapes, devices and memory; a sharded weight may have no row here."""
    tensors: dict[str, Any] = {"hidden": hidden, "weight": weight, "target": target}
    optional = {"bias": bias, "main_grad": main_grad}
    for name, x in (tensors | {k: x for k, x in optional.items() if x is not None}).items():
        check_tensor(name, x)
        if hasattr(x, "to_local"):
            raise ValueError(
                f"{name} must be a plain tensor; got a {type(x).__name__}: gather it, or give its "
                "to_local() with a vocab_group"
            )
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [..., D] and weight [V, D]; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if (weight.shape[0] == 0 and not sharded) or weight.shape[1] == 0:
        raise ValueError(f"weight must have V > 0 and D > 0; got {tuple(weight.shape)}")
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"target must have hidden's leading shape {tuple(hidden.shape[:-1])}; "
            f"got {tuple(target.shape)}, and hidden {tuple(hidden.shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target must be int64 or int32; got {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]; got {tuple(bias.shape)}")
    for name, x in {"weight": weight, "bias": bias, "target": target}.items():
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, like hidden; got {x.device}")
    if main_grad is not None:
        read = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
        _check_main_grad(main_grad, weight, read)


def check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp64: bool) -> None:
    """What is multiplied, after autocast."""
    dtypes = (*_DTYPES, torch.float64) if fp64 else _DTYPES
    if hidden.dtype not in dtypes:
        raise ValueError(f"hidden must be one of {', '.join(map(str, dtypes))}; got {hidden.dtype}")
    for name, x in {"weight": weight, "bias": bias}.items():
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(
                f"{name} must have hidden's dtype {hidden.dtype}; got {x.dtype} "
                "(under autocast both are cast)"
            )


def check_threshold(name: str, threshold: float | Tensor | None) -> None:
    """An entropy in nats: a number, also an infinite one, or a tensor of one value."""
    if isinstance(threshold, Tensor):
        check_tensor(name, threshold, "floating-point")
        if threshold.numel() != 1 or threshold.is_meta:
            raise ValueError(f"{name} must be one value; got {shown(threshold)}")
    elif threshold is not None and (not is_number(threshold) or math.isnan(threshold)):
        raise ValueError(f"{name} must be an entropy in nats; got {shown(threshold)}")


def check_selection_options(
    *,
    fraction: float = 0.2,
    threshold: float | Tensor | None = None,
    which: str = "top",
    scope: str = "batch",
    group: object = None,
) -> None:
    """Each option of a selection by itself."""
    check_fraction(fraction)
    check_threshold("threshold", threshold)
    check_choice("which", which, ("top", "bottom", "random"))
    check_choice("scope", scope, ("batch", "sequence"))
    check_group("group", group)


def check_selection(
    selected: Tensor | None,
    threshold: float | Tensor | None,
    which: str,
    scope: str,
    group: object,
    vocab_group: object,
) -> None:
    if vocab_group is not None and which == "random":
        raise ValueError(
            'which="random" draws on each rank by itself, but those of vocab_group must select the '
            "same tokens; draw once and give selected="
        )
    if selected is not None and threshold is not None:
        raise ValueError("selected and threshold both name the tokens; give one of them")
    check_threshold("threshold", threshold)
    chosen = (which, scope, group) != ("top", "batch", None)
    if chosen and (selected is not None or threshold is not None):
        name = "selected" if selected is not None else "threshold"
        raise ValueError(
            f"which, scope and group choose tokens by `fraction`; with {name}= they have no "
            f"meaning; got which={which!r}, scope={scope!r}, group={group!r}"
        )


def check_like(target: Tensor, **masks: Tensor | None) -> None:
    for name, mask in masks.items():
        if mask is None:
            continue
        check_tensor(name, mask)
        if mask.shape != target.shape or mask.dtype != torch.bool or mask.device != target.device:
            raise ValueError(
                f"{name} must be a bool tensor of target's shape {tuple(target.shape)} on "
                f"{target.device}; got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
            )


def _check_main_grad(main_grad: Tensor, weight: Tensor, others: dict[str, Tensor | None]) -> None:
    """What backward adds the weight's gradient to; it is none of what backward reads."""
    got = tuple(main_grad.shape), main_grad.device
    wanted = tuple(weight.shape), weight.device
    if got != wanted:
        raise ValueError(
            f"main_grad must be {wanted[0]} on {wanted[1]}, like weight; got {got[0]} on {got[1]}"
        )
    if main_grad.dtype not in (torch.float32, weight.dtype):
        dtypes = " or ".join(dict.fromkeys(map(str, (torch.float32, weight.dtype))))
        raise ValueError(f"main_grad must be {dtypes}, that of weight; got {main_grad.dtype}")
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
    for name, x in others.items():
        if x is not None and _overlap(main_grad, x):
            raise ValueError(f"main_grad must have memory of its own; got some of {name}'s")


def _layout(x: Tensor) -> str:
    return f"strides {x.stride()}" if x.layout == torch.strided else str(x.layout)


def _overlap(left: Tensor, right: Tensor) -> bool:
    """Whether their memory does, from first to last value; not asked inside of torch.compile."""
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


def kept_rows(
    above: float | Tensor | None,
    keep_logits: bool,
    max_active_rows: int | None,
    name: str,
    hidden_TD: Tensor,
    vocabulary: int,
    most_bytes: int,
) -> tuple[Tensor | None, int]:
    """The threshold, fp32 [], and how many rows' logits there is room for; or None and 0.

    None where implementation `name` keeps no rows, here or at all, or no backward can follow.
    """
    if above is None:
        return None, 0
    if keep_logits:
        raise ValueError("keep_logits keeps all rows; keep_logits_above has no meaning with it")
    if isinstance(above, Tensor) and (above.numel() != 1 or above.device != hidden_TD.device):
        raise ValueError(
            f"keep_logits_above must be one value on {hidden_TD.device}, like hidden; "
            f"got {tuple(above.shape)} on {above.device}"
        )
    check_threshold("keep_logits_above", above)
    rows = min(hidden_TD.shape[0], most_bytes // (4 * max(vocabulary, 1)))
    rows = rows if max_active_rows is None else min(rows, max_active_rows)
    if rows == 0 or name != "triton" or not torch.is_grad_enabled():
        return None, 0
    # An index is a constant to torch.compile, the size of a dynamic shape is not.
    hidden = operator.index(hidden_TD.shape[1])
    if not _gpu.keeps_rows(hidden_TD.device, hidden_TD.dtype, hidden):
        return None, 0
    if isinstance(above, Tensor):
        return above.detach().reshape(()).float(), rows
    return torch.full((), above, dtype=torch.float32, device=hidden_TD.device), rows
