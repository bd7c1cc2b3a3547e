"""Configuration files in TOML, YAML or JSON; the run.json of a run is one.

A key is a setting by its dotted name, or a table for each dot:

    preset = "qwen3-1.7b"
    steps = 200
    [rollout]
    group_size = 16
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from trainer.config.run import Config

Settings = TypeVar("Settings")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
# YAML 1.1, which PyYAML reads, takes 1e-6 for text.
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class File:
    """What a configuration file says."""

    path: Path
    values: dict[str, Any]
    """Values by the dotted names of the settings, each of its setting's type."""
    preset: str = ""
    """The preset that it names."""
    whole: bool = False
    """Whether it is a run's file, with all settings."""


def leaves(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of each setting of the dataclass `kind`, by its dotted name."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found |= leaves(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def read(path: Path) -> File:
    """The settings in the file at `path`, or those of the run in the folder there.

    The run's `root` and `name` are the folder's, wherever that was when it began.

    Raises:
        ValueError: the file is missing or cannot be parsed, has a key that is no setting, or a
            value of another type. The error is one line that names the file and the key.
    """
    folder = path if path.is_dir() else None
    path = folder / "run.json" if folder else path
    content = _parsed(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold settings by name; got {content!r:.80}")
    whole = isinstance(content.get("config"), Mapping) and "starts" in content
    given = dict(_flat(content["config"] if whole else content, path))
    preset = given.pop("preset", "")
    if not isinstance(preset, str):
        raise ValueError(f"{path}: preset must be text; got {preset!r}")
    types = leaves()
    for name in given.keys() - types.keys():
        raise ValueError(f"{path}: {_unknown(name, types)}")
    values = {name: _typed(path, name, value, types[name]) for name, value in given.items()}
    if folder:
        folder = folder if folder.name else folder.resolve()
        values |= {"name": folder.name, "root": str(folder.parent)}
    return File(path, values, preset, whole)


def fill(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with `values` by dotted names; unchecked: options may yet change what is wrong."""
    filled = object.__new__(type(settings))
    for field in fields(settings):  # type: ignore[arg-type]
        value = values.get(field.name, getattr(settings, field.name))
        if is_dataclass(value):
            start = field.name + "."
            own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
            value = fill(value, own)
        object.__setattr__(filled, field.name, value)
    return filled


def checked(settings: Settings, prefix: str = "") -> Settings:
    """`settings`, made again by their constructors, which check them; ValueError as they raise."""
    values = {}
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        nested = is_dataclass(value)
        values[field.name] = checked(value, f"{prefix}{field.name}: ") if nested else value
    try:
        return type(settings)(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def as_yaml(settings: Config) -> str:
    """All of `settings` as a configuration file."""
    plain = json.loads(json.dumps(asdict(settings)))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def close_names(name: str, names: Mapping[str, Any]) -> str:
    """Which of `names` may be meant by `name`, as the end of a sentence."""
    last = name.rpartition(".")[2]
    ends: dict[str, list[str]] = {}
    for known in names:
        ends.setdefault(known.rpartition(".")[2], []).append(known)
    # A mistake in the last part, in the groups, or in both.
    close = [known for end in difflib.get_close_matches(last, ends, 2, 0.75) for known in ends[end]]
    close += difflib.get_close_matches(name, names, 3, 0.75)
    return f"; close to it: {', '.join([*dict.fromkeys(close)][:4])}" if close else ""


def _parsed(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: a configuration file ends in .toml, .yaml, .yml or .json")
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    try:
        if suffix == ".toml":
            return _toml(text)
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path}: {where}{getattr(error, 'problem', error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of `pairs`; ValueError for a key that is there twice."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} is there twice")
        table[key] = value
    return table


def _flat(table: Mapping[Any, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names; dashes are those of the options."""
    seen = set()
    for key, value in table.items():
        name = prefix + str(key).replace("-", "_")
        inner = _flat(value, path, name + ".") if isinstance(value, Mapping) else [(name, value)]
        for pair in inner:
            if pair[0] in seen:
                raise ValueError(f"{path}: {pair[0]} is there twice")
            seen.add(pair[0])
            yield pair


def _unknown(name: str, types: Mapping[str, Any]) -> str:
    if any(known.startswith(name + ".") for known in types):
        return f"{name} must be a table of settings, such as {name}.{_first(name, types)}"
    return f"no setting {name!r}{close_names(name, types)}"


def _first(group: str, types: Mapping[str, Any]) -> str:
    return next(n.removeprefix(group + ".") for n in types if n.startswith(group + "."))


def _typed(path: Path, name: str, value: Any, hint: Any) -> Any:
    try:
        return _as(value, hint)
    except TypeError:
        raise ValueError(f"{path}: {name} must be {_wanted(hint)}; got {value!r}") from None


def _as(value: Any, hint: Any) -> Any:
    """`value` as a file has it, as `hint` wants it; TypeError where it is of another type."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        if value in arguments:
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list):
            kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(kinds) == len(value):
                return tuple(map(_as, value, kinds))
    elif type(None) in arguments:
        # TOML has no null.
        if value is None or str(value).lower() in ("none", "null"):
            return None
        (kind,) = set(arguments) - {type(None)}
        return _as(value, kind)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _wanted(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(json.dumps, arguments))}"
    if get_origin(hint) is tuple:
        several = arguments[-1] is Ellipsis
        inner = [_wanted(kind) for kind in (arguments[:1] if several else arguments)]
        return f"a list, each {inner[0]}" if several else f"a list: {', '.join(inner)}"
    if type(None) in arguments:
        (kind,) = set(arguments) - {type(None)}
        return f'{_wanted(kind)}, or "none"'
    return _WORDS.get(hint, str(hint))


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(
                problem=f"key {twice!r} is there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> yaml.Node:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])
_Dumper.add_representer(str, _Dumper.represent_text)
