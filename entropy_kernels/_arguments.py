"""Checks of the public functions' arguments; every error names the argument.

Only the checks of values read a tensor, and only on a CPU: nothing waits for a GPU, and nothing is
left of them in a compiled graph.
"""

import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributed import ProcessGroup

_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)
_WHOLE = (numbers.Integral, torch.SymInt)
LARGEST = torch.finfo(torch.float64).max
_warned: set[str] = set()


def shown(x: object) -> str:
    """The argument for an error: a tensor's dtype, shape and device, a plain value, or a type."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)} on {x.device}"
    if x is None or isinstance(x, bool | int | float | str):
        return repr(x)
    return f"a {type(x).__name__}"


def check_tensor(
    name: str, x: object, kind: str = "any", like: Tensor | None = None, of: str = ""
) -> None:
    """A tensor of that kind, "floating-point" or "bool"; on the device of `like`, of its shape."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor; got {shown(x)}{_hint(x)}")
    wrong = {"floating-point": not x.is_floating_point(), "bool": x.dtype != torch.bool}
    if wrong.get(kind, False):
        raise ValueError(f"{name} must be a {kind} tensor; got {shown(x)}")
    if like is None:
        return
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, like {of}; got {x.device}")
    if x.shape != like.shape:
        raise ValueError(f"{name} must have {of}'s shape {tuple(like.shape)}; got {tuple(x.shape)}")


def _hint(x: object) -> str:
    """Names the tensor inside of what is often given in its place."""
    for name in ("weight", "last_hidden_state"):
        if isinstance(getattr(x, name, None), Tensor):
            return f" (give its {name})"
    return ""


def check_advantage(advantage: object, like: Tensor, of: str = "logprob") -> None:
    """One value per token, or [B] where `like` is [B, L]."""
    check_tensor("advantage", advantage, "floating-point")
    assert isinstance(advantage, Tensor)
    if advantage.device != like.device:
        raise ValueError(f"advantage must be on {like.device}, like {of}; got {advantage.device}")
    a_sequence = like.ndim == 2 and advantage.shape == like.shape[:1]
    if advantage.shape != like.shape and not a_sequence:
        raise ValueError(
            f"advantage must have {of}'s shape {tuple(like.shape)}, or be [B] where that is "
            f"[B, L]; got {tuple(advantage.shape)}"
        )


def is_number(x: object) -> bool:
    """A real number that is no bool."""
    return isinstance(x, _NUMBERS) and not isinstance(x, bool)


def check_number(name: str, x: object, wanted: str, holds: Callable[..., bool]) -> None:
    """A number for which `holds`, which no comparison does for NaN."""
    if not is_number(x) or not holds(x):
        raise ValueError(f"{name} must be {wanted}; got {shown(x)}")


def check_whole(name: str, x: object, least: int | None = None, wanted: str = "an int") -> None:
    """A whole number, of at least `least`."""
    whole = isinstance(x, _WHOLE) and not isinstance(x, bool)
    if not whole or (least is not None and not x >= least):  # type: ignore[operator]
        raise ValueError(f"{name} must be {wanted}; got {shown(x)}")


def check_fraction(fraction: object) -> None:
    check_number("fraction", fraction, "a number in (0, 1]", lambda x: 0 < x <= 1)


def check_threshold(name: str, threshold: float | Tensor | None) -> None:
    """An entropy in nats: a number, also an infinite one, or a tensor of one value."""
    if isinstance(threshold, Tensor):
        check_tensor(name, threshold, "floating-point")
        if threshold.numel() != 1 or threshold.is_meta:
            raise ValueError(f"{name} must be one value; got {shown(threshold)}")
    elif threshold is not None and (not is_number(threshold) or math.isnan(threshold)):
        raise ValueError(f"{name} must be an entropy in nats; got {shown(threshold)}")


def check_masks(target: Tensor, **masks: Tensor | None) -> None:
    """Bool tensors like the targets, or None."""
    for name, mask in masks.items():
        if mask is None:
            continue
        check_tensor(name, mask)
        if mask.shape != target.shape or mask.dtype != torch.bool or mask.device != target.device:
            raise ValueError(
                f"{name} must be a bool tensor of target's shape {tuple(target.shape)} on "
                f"{target.device}; got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
            )


def check_clip(name: str, clip: object) -> None:
    """A distance, a number or a tensor."""
    if isinstance(clip, Tensor):
        check_tensor(name, clip, "floating-point")
    else:
        check_number(name, clip, "a number >= 0 or a tensor", lambda x: x >= 0)


def check_loss_option(name: str, value: Any, logprob: Tensor) -> None:
    """A keyword of one of the functions in `losses`."""
    if name in ("clip_low", "clip_high"):
        check_clip(name, value)
        if isinstance(value, Tensor) and value.ndim > 0:
            check_tensor(name, value, "any", logprob, "logprob")
    elif name == "dual_clip" and value is not None:
        check_number(name, value, "a number > 1 or None", lambda x: x > 1)
    elif name == "sequence_group":
        check_group(name, value)
    elif name in ("tau_pos", "tau_neg", "cap"):
        check_number(name, value, "a number > 0", lambda x: x > 0)
    elif name.startswith(("k_", "lambda_")):
        check_finite(name, value)


def check_count(name: str, count: object, words: str = "") -> None:
    """A number, or a tensor of one."""
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.dtype == torch.bool or count.is_complex():
            raise ValueError(f"{name} must be {words}a count, one number; got {shown(count)}")
        check_values(name, count, ">= 0 and finite", 0, LARGEST)
    elif not is_number(count):
        raise ValueError(f"{name} must be {words}a count; got {shown(count)}")
    else:
        check_number(name, count, "a finite number > 0", lambda x: 0 < x < math.inf)


def check_finite(name: str, x: object) -> None:
    check_number(name, x, "a finite number", math.isfinite)


def check_coefficient(name: str, x: object) -> None:
    """A finite number, or a tensor of one."""
    if not isinstance(x, Tensor):
        check_finite(name, x)
        return
    check_tensor(name, x, "floating-point")
    if x.numel() != 1 or x.is_meta:
        raise ValueError(f"{name} must be one number; got {shown(x)}")
    check_values(name, x, "finite", -LARGEST, LARGEST)


def check_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"{name} must be True or False; got {shown(x)}")


def check_choice(name: str, x: object, choices: Collection[str | None]) -> None:
    # Not of a union, which torch.compile of torch 2.8 does not know.
    if not isinstance(x, (str, type(None))) or x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {shown(x)}")


def check_group(name: str, group: object) -> None:
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(
            f"{name} must be a torch.distributed.ProcessGroup that this process belongs to, or "
            f"None; got {shown(group)}"
        )


def check_generator(generator: object, like: Tensor, of: str) -> None:
    """None, or one that draws on the device of `like`."""
    if generator is None:
        return
    known = isinstance(generator, Generator)
    if not known or generator.device.type != like.device.type:  # type: ignore[attr-defined]
        got = f"one on {generator.device}" if known else shown(generator)  # type: ignore[attr-defined]
        raise ValueError(
            f"generator must be a torch.Generator on {like.device}, like {of}, or None; got {got}"
        )


def as_scalar(x: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One value, detached, as a 0-dim tensor. Nothing waits for a GPU, not for a CPU's value."""
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=dtype, device=device)
    x = x.detach().reshape(())
    x = torch.ones((), dtype=dtype, device=device) * x if x.device.type == "cpu" else x
    return x.to(device, dtype)


def readable(x: object) -> bool:
    """Whether values of `x` are at hand: those of a plain tensor on a CPU, outside of a graph."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and x.device.type == "cpu" and x.numel() > 0  # type: ignore[attr-defined]


def check_logprobs(name: str, x: Tensor | None, among: Tensor, *, inf: bool = False) -> None:
    """On a CPU: at most 0 at the tokens of `among`, to rounding, and not -inf; NaN is let through.

    Two fast passes over `x`, and more only where they find something.
    """
    if not readable(x):
        return
    assert x is not None
    # Logits of 16 bits less their log-sum-exp are above 0 by up to their own rounding.
    most = 1e-3 if x.element_size() > 2 else 0.25
    x = x.detach()
    # NaN is no maximum that fits, and what is not finite leaves no finite sum.
    if float(x.amax()) <= most and (inf or math.isfinite(float(x.sum()))):
        return
    wrong = x > most
    wrong = among & (wrong & ~x.isinf() if inf else wrong | (x == -math.inf))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        value = float(x[place])
        raise ValueError(
            f"{name} must be log-probabilities, finite and at most 0; got {value:.6g} at {place}"
            + (" (probabilities, or with the sign of a loss?)" if value > 0 else "")
        )


def check_values(
    name: str, x: object, wanted: str, least: float, most: float, data: Tensor | None = None
) -> None:
    """On a CPU: within [least, most]; of `data`, at those tokens, where also NaN is let through."""
    if not readable(x):
        return
    assert isinstance(x, Tensor)
    x = x.detach()
    if (least, most) == (-LARGEST, LARGEST):
        if math.isfinite(float(x.sum())):
            return
    else:
        low, high = (float(end) for end in x.aminmax())
        if least <= low and high <= most:
            return
    x = x.double()
    wrong = ~((x >= least) & (x <= most))
    if data is not None:
        # One per sequence counts where the sequence has a token.
        wrong = wrong & (data if x.shape == data.shape else data.any(1)) & ~x.isnan()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} must be {wanted}; got {float(x[place]):.6g} at {place}")


def warn_once(cause: str, message: str) -> None:
    """Once in a process for each cause, at the line that called the package."""
    if cause in _warned or torch.compiler.is_compiling():
        return
    _warned.add(cause)
    warn_caller(message, UserWarning)


def warn_caller(message: str, category: type[Warning]) -> None:
    """At the line that called the package."""
    package, level = (__package__ or __name__).partition(".")[0], 1
    frame = sys._getframe()
    while frame.f_back is not None and _within(frame.f_globals.get("__name__", ""), package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
