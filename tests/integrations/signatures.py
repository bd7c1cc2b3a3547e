"""What others' functions and options are called, for replacements and for docs/losses.md."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
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


def names_in_docs(library: str) -> list[str]:
    """Every option that the table of docs/losses.md names for `library`, without a value.

    Names in parentheses and after "for" are losses and values.
    """
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    lines = page.split("## Options by their names elsewhere")[1].split("\n## ")[0].splitlines()
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    cells = [row[head.index(library)] for row in rows]
    options = [re.sub(r"\(.*?\)|for `.*?`", "", cell) for cell in cells]
    return [name.split("=")[0] for cell in options for name in re.findall("`(.*?)`", cell)]
