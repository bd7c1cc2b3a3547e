"""Marks functions for torch.compile, without importing it."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler: a second.

    A graph calls `function` once, when it is traced, and keeps what it returns.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
