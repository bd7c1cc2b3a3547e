"""Functions that a setting names as "module:function"; nothing here imports torch."""

import importlib
from collections.abc import Callable
from typing import Any


def function_named(name: str, what: str) -> Callable[..., Any]:
    """The function of `name`, "module:function"; `what` says in errors what is named so.

    Raises ValueError, naming what is missing, for what cannot be imported or called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f'{what} is named "module:function"; got {name!r}')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of any kind: the module runs on import
        raise ValueError(
            f"{name}: cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{name}: {module.__file__} has no {attribute!r}")
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"{name}: a {type(function).__name__} is not callable")
    found: Callable[..., Any] = function
    return found
