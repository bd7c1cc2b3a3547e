"""What a run was at its last start, and what has changed since."""

import hashlib
import importlib.machinery
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.config.changes import Change, differences
from trainer.log import read_run
from trainer.tasks.problem import Task

Inputs = dict[str, str]
"""Digests of the data, the model and the verifier that settings name; "" where unknown."""

_COLUMNS = ("data.prompt_field", "data.answer_field")
_INPUTS = {
    "data": ("data.task", None),
    "model": ("model.path", "the run goes on with its own weights"),
    "verifier": ("reward.function", "its verdicts may be others"),
}


@dataclass(frozen=True)
class Earlier:
    """What run.json says."""

    config: dict[str, Any]
    starts: list[dict[str, Any]]
    origin: dict[str, Any] | None = None
    """Where a branch comes from; its first `origin["starts"]` starts are the other run's."""

    @property
    def just_branched(self) -> bool:
        """Whether it has not started yet: settings and starts are the other run's."""
        return self.origin is not None and len(self.starts) == self.origin["starts"]

    @property
    def last(self) -> dict[str, Any]:
        return self.starts[-1] if self.starts else {}


def read_earlier(folder: Path) -> Earlier | None:
    """The run in `folder`; None where there is none.

    Raises:
        ValueError: run.json is damaged.
    """
    if not (folder / "run.json").exists():
        return None
    run = read_run(folder)
    return Earlier(run["config"], run["starts"], run.get("origin"))


@dataclass(frozen=True)
class Resuming:
    """A run that goes on: what it was, what is wanted now, and what may differ."""

    folder: Path
    earlier: Earlier
    settings: Config
    allowed: Sequence[str] | None
    """Settings or groups of them; None: all."""

    def settings_changes(self) -> list[Change]:
        """The changes of settings. Raises ValueError for those that must be allowed, except for the
        places of data and model, whose contents may be the same."""
        directory = Path(self.earlier.last.get("directory", ""))
        changes = differences(self.earlier.config, self.settings, directory)
        self._refuse(
            [change for change in changes if change.name not in ("data.task", "model.path")]
        )
        return changes

    def input_changes(self, changes: Sequence[Change], inputs: Inputs) -> list[Change]:
        """`changes` and those of contents; another place with the same contents may be taken.

        Raises:
            ValueError: one of them must be allowed, and is not.
        """
        before: Inputs = self.earlier.last.get("inputs", {})
        found = {change.name: change for change in changes}
        for kind, (name, effect) in _INPUTS.items():
            was, now = before.get(kind, ""), inputs[kind]
            # Other columns have other contents.
            if not (was and now) or (kind == "data" and not found.keys().isdisjoint(_COLUMNS)):
                continue
            if was != now:
                found.setdefault(name, self._other_contents(name, was, now, effect))
            elif name in found and kind != "verifier":
                found[name] = replace(found[name], effect="the same contents")
        all_of_them = [found[name] for name in sorted(found)]
        self._refuse(all_of_them)
        return all_of_them

    def _other_contents(self, name: str, was: str, now: str, effect: str | None) -> Change:
        group, _, field = name.partition(".")
        value = getattr(getattr(self.settings, group), field)
        return Change(name, f"{value} of digest {was}", f"of {now}", effect)

    def _refuse(self, changes: Sequence[Change]) -> None:
        different = [c for c in changes if c.effect is None and not self._is_allowed(c.name)]
        if different:
            # Those that are allowed have to be named again.
            names = " ".join([*(self.allowed or ()), *(change.name for change in different)])
            raise ValueError(
                f"{self.folder} holds a run with other settings: "
                f"{'; '.join(map(str, different))}. Choose another --name; go on with these, which "
                f"is noted, by --allow-changes {names}; or go on elsewhere by "
                f"--branch {self.folder} --name NEW"
            )

    def _is_allowed(self, name: str) -> bool:
        if self.allowed is None:
            return True
        return any(name == one or name.startswith(one + ".") for one in self.allowed)


def resuming(
    folder: Path, settings: Config, allow_changes: Sequence[str], branching: bool, fresh: bool
) -> Resuming | None:
    """How the run in `folder` goes on; None where it is `fresh`, without a checkpoint.

    Raises:
        ValueError: run.json is missing or damaged; a branch that was not laid out to the end.
    """
    earlier = read_earlier(folder)
    if fresh:
        if earlier is not None and earlier.origin is not None:
            raise ValueError(
                f"{folder} is a branch from {earlier.origin['run']} without its checkpoint: give "
                f"--branch {earlier.origin['run']}@{earlier.origin['step']} again"
            )
        return None
    if earlier is None:
        raise ValueError(f"{folder} has checkpoints and no run.json: put it back, or delete them")
    free = branching and earlier.just_branched
    return Resuming(folder, earlier, settings, None if free else tuple(allow_changes))


def inputs_of(settings: Config, task: Task) -> Inputs:
    """Digests of the problems, of the starting model where it is a folder, and of the verifier."""
    return {
        "data": getattr(task, "digest", ""),
        "model": folder_digest(Path(settings.model.path)),
        "verifier": _module_digest(settings.reward.function.partition(":")[0]),
    }


def start_record(
    step: int, changes: Sequence[Change], inputs: Inputs, left_out: Mapping[str, int]
) -> dict[str, Any]:
    """The record of a start in run.json: where it goes on, on what, and what has changed."""
    return {
        "step": step,
        "directory": os.getcwd(),
        "inputs": inputs,
        "left_out": left_out,
        "changes": {change.name: [change.was, change.now] for change in changes},
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """A digest of the names and sizes of the files in `folder`, and of the small ones' contents."""
    if not folder.is_dir():
        return ""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    read = [path.read_bytes() if path.suffix == ".json" else b"" for path in files]
    return _digest(*(f"{path.name} {path.stat().st_size}".encode() for path in files), *read)


def _module_digest(name: str) -> str:
    """A digest of the file of the module `name`, which is not imported."""
    where: Sequence[str] | None = None
    # By its last part: a whole name makes Python look for packages that are not imported.
    for part in name.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, where)
        if spec is None:
            return ""
        where = spec.submodule_search_locations
    return _digest(Path(spec.origin).read_bytes()) if spec and spec.origin else ""
