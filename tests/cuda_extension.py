"""The extension _cuda in Python: its structs and calls, as launch.h and bindings.cpp have them.

It checks names and types of what it is given, and hands each call to a function. Nothing here
stands for CUDA or its driver.
"""

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from entropy_kernels import _extensions

STREAM = 7

_FOLDER = Path(__file__).parents[1] / "csrc" / "cuda"
_TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "Stream": ctypes.c_void_p,
}
# What pybind11 takes for each, without a conversion that loses anything.
_PYTHON = {ctypes.c_float: (int, float), ctypes.c_double: (int, float), ctypes.c_bool: (bool,)}


@functools.cache
def _text(name: str) -> str:
    return re.sub(r"//[^\n]*", "", (_FOLDER / name).read_text())


def _type_of(words: str) -> Any:
    if words.endswith("&"):
        return structs()[words.removesuffix(" const&")]
    return ctypes.c_void_p if words.endswith("*") else _TYPES[words]


def _check(name: str, kind: Any, value: Any) -> None:
    wanted = _PYTHON.get(kind, (int,)) if kind.__module__ == "ctypes" else (kind,)
    assert type(value) in wanted, f"{name} is {value!r}, not {kind.__name__}"


@functools.cache
def structs() -> dict[str, Any]:
    """The structs of launch.h, made from all their fields by keyword."""
    found = re.findall(r"^struct (\w+) \{(.*?)^\};", _text("launch.h"), re.M | re.S)
    return {name: _struct(name, body) for name, body in found}


def _struct(name: str, body: str) -> Any:
    fields = [
        (field, _type_of(words)) for words, field in re.findall(r"(\w[\w ]*\*?) (\w+);", body)
    ]

    def made(self: Any, **given: Any) -> None:
        assert given.keys() == dict(fields).keys(), f"{name} of {given.keys()}"
        for field, kind in fields:
            _check(f"{name}.{field}", kind, given[field])
        ctypes.Structure.__init__(self, **given)

    return type(name, (ctypes.Structure,), {"_fields_": fields, "__init__": made})


@functools.cache
def calls() -> dict[str, dict[str, Any]]:
    """The arguments of every function, by the names of bindings.cpp, with their types."""
    found = {}
    bound = re.findall(r"bind_function\(m, \"(\w+)\", &ek::\w+,([^;]*)\);", _text("bindings.cpp"))
    for name, names in bound:
        (words,) = re.findall(rf"^\w+ {name}\(([^;]*)\);", _text("launch.h"), re.M)
        kinds = [_type_of(_without_name(" ".join(x.split()))) for x in words.split(",")]
        found[name] = dict(zip(re.findall(r"\w+", names), kinds, strict=True))
    return found


def _without_name(words: str) -> str:
    return re.match(r"(\w+ const[&*]|\w+\*?)", words)[0]


def constants() -> dict[str, int]:
    """The numbers of launch.h by the names of bindings.cpp."""
    named = re.findall(r"m\.attr\(\"(\w+)\"\) = ek::(\w+);", _text("bindings.cpp"))
    values = dict(re.findall(r"^constexpr \w+ (\w+) = ([\d <]+);", _text("launch.h"), re.M))
    return {name: eval(values[constant]) for name, constant in named}


class Extension(ModuleType):
    """`run` is given each call's name and arguments; `calls` has them all."""

    sources = "the text of csrc/cuda"
    compiler = "nvcc"
    architectures = "80 90a 100a"
    cutlass = "4.2.0"

    def __init__(self, run: Callable[[str, dict[str, Any]], Any] | None = None) -> None:
        super().__init__("_cuda")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._run = run
        vars(self).update(structs() | constants())
        vars(self).update({name: functools.partial(self._call, name) for name in calls()})

    def _call(self, name: str, **given: Any) -> Any:
        wanted = calls()[name]
        assert given.keys() == wanted.keys(), f"{name} of {given.keys()}"
        for argument, kind in wanted.items():
            _check(f"{argument} of {name}", kind, given[argument])
        self.calls.append((name, given))
        if self._run is not None:
            return self._run(name, given)
        return (
            -(-given["vocabulary"] // given["tile"].columns) if name == "forward_splits" else None
        )

    def runtime_version(self) -> int:
        return 13000

    def driver_version(self) -> int:
        return 13000

    @property
    def launched(self) -> list[str]:
        """The names of the calls that launch."""
        return [name for name, _ in self.calls if name != "forward_splits"]


def install(monkeypatch: Any, extension: Any) -> Any:
    """Lets the package find `extension` in the place of its own, with STREAM for a GPU's stream."""
    load, stream = _extensions.load, SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: stream)
    monkeypatch.setattr(
        _extensions, "load", lambda name: (extension, None) if name == "cuda" else load(name)
    )
    return extension
