"""What a replacement must take: all that the function in whose place it is takes, and by name."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from entropy_kernels.integrations._patch import Patch


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each, without a method's first."""
    found = list(inspect.signature(function).parameters.values())
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "ctx")]


def assert_same_parameters(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    assert parameters(ours) == parameters(theirs), f"{ours} in the place of {theirs}"


def replacements(patch: Callable[[], Patch]) -> list[tuple[str, Any, Any]]:
    """Name, what was there before and what took its place, of all that `patch` replaces."""
    given: list[tuple[str, Any, Any]] = []
    begin = Patch.__init__

    def recorded(self: Patch, *found: tuple[Any, str, Any]) -> None:
        given.extend((name, getattr(owner, name), new) for owner, name, new in found)
        begin(self, *found)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Patch, "__init__", recorded)
        patch().undo()
    assert given
    return given
