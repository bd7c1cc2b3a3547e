"""Loads the compiled extensions of csrc/, or says why they are missing."""

import functools
import importlib
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401

from ._build_record import digest, why_not_built

_PACKAGE = Path(__file__).parent
_COMPILERS = {"cuda": "nvcc"}


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The extension _{name}, or why it is missing.

    torch comes first: this file imports it. It ships its own OpenMP runtime, and an extension that
    is loaded later joins that thread pool instead of starting another.
    """
    full_name = f"{__package__}._{name}"
    again = f"reinstall with {_COMPILERS.get(name, 'a C++ compiler')} on PATH"
    # Beside this file alone: the finder of an editable install knows those of another checkout.
    if PathFinder.find_spec(full_name, [str(_PACKAGE)]) is None:
        why = why_not_built(_PACKAGE, name) or f"{_PACKAGE} has none; {again}"
        return None, f"{full_name} is not built: {why}"
    try:
        module = importlib.import_module(full_name)
    except ImportError as error:
        return None, f"{full_name} does not load: {type(error).__name__}: {error}; {again}"
    sources = digest(_PACKAGE.parent, name)
    if sources not in (None, getattr(module, "sources", None)):
        return None, f"{full_name} is not built from this csrc/; run pip install -e . again"
    return module, None
