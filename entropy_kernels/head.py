"""The LM head as one value: which hidden states, which weight, which targets, and how logits form.

T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_number, check_tensor, check_whole
from ._shapes import Float, Int

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = ("hidden", "weight", "target", "bias", "temperature")


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a language model on some tokens.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

    A Head checks nothing when it is made; the functions that take one call `check`. Backends take
    the form that `flat` gives.
    """

    hidden: Float[Tensor, "*tokens D"]
    """Last hidden states, fp32, bf16 or fp16; hidden[t] predicts target[t]."""
    weight: Float[Tensor, "V D"]
    """The head's weight, in the dtype of hidden; autocast casts both as it does for `linear`."""
    target: Int[Tensor, "*tokens"]
    """Token ids, int64 or int32."""
    bias: Float[Tensor, " V"] | None = None
    """Added to the logits before the softcap."""
    temperature: float | Float[Tensor, "..."] | None = 1.0
    """Divides the logits: > 0, one value or one per token, not differentiated. `flat` gives fp32
    [1] or [T], or None for 1."""
    softcap: float | None = None
    """Bound of the logits, as in Gemma 2."""
    ignore_index: int = -100
    """The target of tokens that have none: their outputs are zero and they get no gradient."""
    logit_scale: float = 1.0
    """Multiplies the logits before the softcap, > 0: Cohere's `logit_scale`, and one over Granite's
    `logits_scaling`. `flat` folds it into temperature and softcap."""

    def check(self, *, sharded: bool = False) -> None:
        """Checks types, shapes, devices and plain values; dtypes are checked by `flat`.

        sharded: the vocabulary is divided among ranks, and this one's weight may have no row.

        Raises:
            ValueError: names the field, what came and what was wanted.
        """
        check_softcap(self.softcap)
        positive = "a finite number > 0"
        check_number("logit_scale", self.logit_scale, positive, lambda x: 0 < x < math.inf)
        check_whole("ignore_index", self.ignore_index)
        _check_tensors(self)
        _check_shapes(self, sharded)
        for name in ("weight", "bias", "target"):
            x = getattr(self, name)
            if x is not None and x.device != self.hidden.device:
                raise ValueError(
                    f"{name} must be on {self.hidden.device}, like hidden; got {x.device}"
                )
        check_temperature(self.temperature, self.target)

    def flat(self, *, fp64: bool = False) -> "Head":
        """The form that backends take, of a head that was checked.

        hidden [T, D], weight [V, D], target int64 [T], bias [V] or None, temperature fp32 [1] or
        [T] or None for 1. Under autocast hidden, weight and bias are what `linear` would multiply.

        Raises:
            ValueError: a dtype that does not fit; fp64 is legal where `fp64` says so.
        """
        hidden, weight, bias = self.hidden, self.weight, self.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), _cast_once(weight, dtype)
            bias = None if bias is None else bias.to(dtype)
        _check_dtypes(hidden, weight, bias, fp64)
        return replace(
            self,
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            weight=weight,
            target=self.target.reshape(-1).long(),
            bias=bias,
            # c tanh(k x / c) = k (c / k) tanh(x / (c / k)), so a scale is a temperature.
            temperature=_flat_temperature(self.temperature, self.logit_scale, self.target.device),
            softcap=None if self.softcap is None else self.softcap / self.logit_scale,
            logit_scale=1.0,
        )

    def at(self, index_R: Tensor) -> "Head":
        """The head on the tokens of these numbers, which count through the leading shape."""
        temperature = self.temperature
        if isinstance(temperature, Tensor) and temperature.numel() > 1:
            temperature = temperature.reshape(-1)[index_R]
        return replace(
            self,
            hidden=self.hidden.reshape(-1, self.hidden.shape[-1])[index_R],
            target=self.target.reshape(-1)[index_R],
            temperature=temperature,
        )

    def split(self) -> tuple[tuple[Tensor | None, ...], dict[str, float | None]]:
        """The flat form's tensors, for autograd to save, and its other fields, for `joined`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = tuple(named.pop(name) for name in _TENSORS)
        return tensors, named

    @staticmethod
    def joined(tensors: Sequence[Tensor | None], options: dict[str, float | None]) -> "Head":
        """The head that was `split`."""
        named: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
        return Head(**named | options)

    @property
    def valid(self) -> Tensor:
        """Which tokens have a target: bool, in the shape of target."""
        return self.target != self.ignore_index

    @property
    def temperature_T(self) -> Tensor | None:
        """The temperature of every row of the flat form, fp32 [T]; None stands for 1."""
        if self.temperature is None:
            return None
        assert isinstance(self.temperature, Tensor)
        return self.temperature.float().expand(self.target.shape)


def check_softcap(softcap: object) -> None:
    if softcap is not None:
        wanted = "a finite number > 0 or None"
        check_number("softcap", softcap, wanted, lambda x: 0 < x < math.inf)


def check_temperature(temperature: object, target: Tensor | None = None) -> None:
    """A number, or a tensor of one value or one per token; the op checks the tensor's values."""
    if not isinstance(temperature, Tensor):
        finite = "a tensor, or a finite number > 0"
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


def _check_tensors(head: Head) -> None:
    tensors: dict[str, Any] = {"hidden": head.hidden, "weight": head.weight, "target": head.target}
    if head.bias is not None:
        tensors["bias"] = head.bias
    for name, x in tensors.items():
        check_plain(name, x)


def check_plain(name: str, x: object) -> None:
    """A tensor that is no DTensor."""
    check_tensor(name, x)
    if hasattr(x, "to_local"):
        raise ValueError(
            f"{name} must be a plain tensor; got a {type(x).__name__}: gather it, or give its "
            "to_local() with a vocab_group"
        )


def _check_shapes(head: Head, sharded: bool) -> None:
    hidden, weight, target, bias = head.hidden, head.weight, head.target, head.bias
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


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp64: bool) -> None:
    """The dtypes of the product's operands, after autocast."""
    dtypes = (*_DTYPES, torch.float64) if fp64 else _DTYPES
    if hidden.dtype not in dtypes:
        raise ValueError(f"hidden must be one of {', '.join(map(str, dtypes))}; got {hidden.dtype}")
    for name, x in {"weight": weight, "bias": bias}.items():
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(
                f"{name} must have hidden's dtype {hidden.dtype}; got {x.dtype} "
                "(under autocast both are cast)"
            )


def _cast_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as autocast's region has it for `linear`: cast at its first use, then remembered.

    Only products reach that memory. One without a column costs nothing, and saves what it casts.
    """
    trained = weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()
    if not trained or weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return weight.to(dtype)
    no_columns = weight.new_empty(weight.shape[1], 0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        product = torch.mm(weight, no_columns)
        cast = product.grad_fn._saved_self  # type: ignore[union-attr]
    # A region that began without gradients may remember a weight without them.
    return cast if cast.requires_grad else weight.to(dtype)


def _flat_temperature(
    temperature: float | Tensor | None, logit_scale: float, device: torch.device
) -> Tensor | None:
    if isinstance(temperature, Tensor):
        return temperature.detach().reshape(-1).float() / logit_scale
    temperature = (1.0 if temperature is None else temperature) / logit_scale
    if temperature == 1:
        return None
    return torch.full((1,), float(temperature), dtype=torch.float32, device=device)
