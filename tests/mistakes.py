"""Wrong values of arguments, by what is wanted: each with a part of the message that tells them.

A table of mistakes is {label: (value, what the message says came)}. B sequences, L tokens each, D
hidden, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

Mistakes = dict[str, tuple[Any, str]]

B, L, D, V = 2, 3, 4, 7
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(B, L, D, generator=G), torch.randn(V, D, generator=G)
TARGET = torch.randint(V, (B, L), generator=G)
LOGPROB = -torch.rand(B, L, generator=G) - 0.1
ENTROPY, ADVANTAGE = torch.rand(B, L, generator=G), torch.randn(B, L, generator=G)
MASK = torch.tensor([[True, True, False], [True, True, True]])
SAMPLE = torch.rand(B, L, generator=G) / 2


class Call(NamedTuple):
    """A function, right arguments, and wrong ones for each name."""

    function: Callable[..., Any]
    right: dict[str, Any]
    wrong: dict[str, Mistakes]


def each(calls: dict[str, Call]) -> Iterator[Any]:
    """Every wrong value of every argument, as pytest's parameters."""
    for title, call in calls.items():
        for name, wrong in call.wrong.items():
            for label, (value, came) in wrong.items():
                key = f"{title}-{name}-{label}"
                yield pytest.param(call, name, value, came, id=key)


def check(call: Call, name: str, value: Any, came: str, said: str | None = None) -> None:
    """A ValueError that names the argument, or calls it what is `said`, and what came."""
    with pytest.raises(ValueError, match=re.escape(came)) as raised:
        call.function(**call.right | {name: value})
    assert (said or name) in str(raised.value)


NAN, INF = float("nan"), float("inf")
_OTHERS: Mistakes = {
    "None": (None, "None"),
    "a list": ([0.1, 0.2], "list"),
    "a tuple": ((0.1,), "tuple"),
    "an array": (np.zeros(3, dtype=np.float32), "ndarray"),
    "a layer": (torch.nn.Linear(2, 2), "Linear"),
    "an output": (CausalLMOutput(logits=torch.zeros(2)), "CausalLMOutput"),
}
_FLOAT = torch.zeros(2)


def _without(mistakes: Mistakes, optional: bool) -> Mistakes:
    return {label: x for label, x in mistakes.items() if not (optional and label == "None")}


def not_tensors(optional: bool = False) -> Mistakes:
    plain = {"a float": (0.5, "0.5"), "an int": (3, "3"), "a word": ("foo", "'foo'")}
    return _without(_OTHERS, optional) | plain


def tensor(right: Tensor, *dtypes: torch.dtype, optional: bool = False) -> Mistakes:
    """What is none, or `right` with another dtype, shape or device."""
    found = not_tensors(optional)
    for dtype in dtypes:
        found[str(dtype)] = (right.detach().to(dtype), str(dtype))
    shapes = {"0-dim": right.detach().new_zeros(())}
    if right.ndim > 0:
        shapes["one less"] = right.detach()[..., :-1]
    if right.ndim > 1:
        shapes |= {"transposed": right.detach().transpose(-1, -2), "a row": right.detach()[0]}
    found |= {label: (x, str(tuple(x.shape))) for label, x in shapes.items()}
    return found | {"elsewhere": (right.detach().to("meta"), "meta")}


def floats(right: Tensor, optional: bool = False) -> Mistakes:
    dtypes = torch.int64, torch.bool, torch.complex64
    return tensor(right, *dtypes, optional=optional)


def mask(right: Tensor, optional: bool = False) -> Mistakes:
    return tensor(right, torch.int64, torch.float32, torch.uint8, optional=optional)


def number(*outside: float, optional: bool = False, of: tuple[int, ...] | None = None) -> Mistakes:
    """No number, NaN, and what lies outside of the range; a tensor, but one of that shape."""
    found = _without(_OTHERS, optional)
    found |= {"a word": ("0.2", "'0.2'"), "a bool": (True, "True"), "nan": (NAN, "nan")}
    if of is not None:
        found |= {
            "too many": (torch.zeros(2, 1), "(2, 1)"),
            "an int tensor": (torch.ones(of, dtype=torch.int64), "int64"),
            "a bool tensor": (torch.ones(of) > 0, "bool"),
            "elsewhere": (torch.ones(of, device="meta"), "meta"),
        }
    else:
        found["a tensor"] = (_FLOAT, "float32")
    return found | {str(x): (x, str(x)) for x in outside}


def count(optional: bool = False) -> Mistakes:
    found = number(0, 0.0, -1, INF, optional=optional) | {
        "a word": ("foo", "'foo'"),
        "two": (torch.ones(2), "(2,)"),
        "a bool tensor": (torch.ones(()) > 0, "bool"),
        "a negative tensor": (torch.tensor(-2.0), "-2"),
        "a broken tensor": (torch.tensor(NAN), "nan"),
        "elsewhere": (torch.ones((), device="meta"), "meta"),
    }
    del found["a tensor"]
    return found


def word(optional: bool = False) -> Mistakes:
    found = _without(_OTHERS, optional)
    return found | {"a word": ("foo", "'foo'"), "a number": (3, "3"), "a tensor": (_FLOAT, "float")}


def flag() -> Mistakes:
    return _OTHERS | {"a word": ("yes", "'yes'"), "a number": (1, "1"), "a tensor": (_FLOAT, "32")}


def whole(*outside: float, optional: bool = False) -> Mistakes:
    return number(0.5, *outside, optional=optional)


def group() -> Mistakes:
    return _without(_OTHERS, optional=True) | {
        "a word": ("world", "'world'"),
        "a number": (0, "0"),
        "not of this rank": (torch.distributed.GroupMember.NON_GROUP_MEMBER, "-100"),
    }


def generator() -> Mistakes:
    return _without(_OTHERS, optional=True) | {"a seed": (0, "0")}


def contents(right: Tensor, *values: float) -> Mistakes:
    """The tensor with one of these in a token of the mask."""
    found = {}
    for value in values:
        wrong = right.clone()
        wrong[1, 2] = value
        found[f"{value} in it"] = (wrong, str(value))
    return found
