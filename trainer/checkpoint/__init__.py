"""Checkpoints of a run: sharded, written whole or not at all, read by any number of ranks.

checkpoints/step-000020/
  *.safetensors            the weights (sharded.py). One process writes whole tensors and their
                           index, a folder that transformers loads; of several, each its shards.
  optimizer/*.safetensors  AdamW's moments and step counts; missing before the first update
  config.json, ...         configuration of the model and of its generation, tokenizer
  state.json               {"step", "next_problem", "updates", "entropy"}: see `Progress`
  manifest.json            size and checksum of every other file

This is the whole state of a run. The learning rate is a function of `updates`, the place in the
data is `next_problem`, all other settings are the run's. Every random number is a function of the
run's seed and the step, torch's own generator being seeded anew each step: there is no other state
of random numbers. No threshold of the entropy outlives its step.

All ranks write into one hidden folder, on a file system they share. When they are done the first
rank adds state.json and the manifest, and waits until everything is on the disk. It then gives the
folder its name in one rename: what has the name is whole, whichever process is killed when.
"""

import errno
import json
import os
import re
import secrets
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from trainer.checkpoint import manifest, sharded
from trainer.finite import check_finite
from trainer.model.folder import write_settings
from trainer.policy import Policy
from trainer.ranks import Ranks

OPTIMIZER = "optimizer"
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"
_NAME = re.compile(rf"(?:{re.escape(_REPLACED)})?step-(\d{{6,}})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Progress:
    """Where a run stands, beside its weights."""

    step: int = 0
    """RL steps done; with the run's seed, the state of its random numbers."""
    next_problem: int = 0
    """Index of the first training problem not yet used."""
    updates: int = 0
    """Optimizer steps done, which give the learning rate."""
    entropy: dict[str, float | None] = field(default_factory=dict)
    """The state of `ek.EntropyController`; empty where nothing is controlled."""


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    ranks: Ranks,
    keep_every: int = 0,
) -> Path:
    """Write checkpoint `progress.step` of the run in `folder`, then delete all but `keep`.

    Those at multiples of `keep_every` steps, the first among them, stay too; 0: none.

    Collective: every rank writes its shards, and what fails on one is raised on all.

    Raises:
        OSError: it could not be written, and the one before it stays. On a full disk the error
            says how many bytes are needed and free.
        ValueError: the ranks do not share a file system, or a sharded model has no group; a weight
            or a moment of the optimizer is not finite.
    """
    root = folder / "checkpoints"
    final = path_of(folder, progress.step)
    weights = sharded.weights(policy.model)
    moments = sharded.moments(policy.model, optimizer)
    check_finite({**weights, **moments}.items(), ranks, "so no checkpoint is written")
    unfinished = root / ranks.on_first(lambda: _UNFINISHED + secrets.token_hex(4))
    try:
        ranks.on_first(lambda: _begin(unfinished))
        sharded.write(weights, unfinished, ranks)
        sharded.write(moments, unfinished / OPTIMIZER, ranks)
        entries = ranks.on_all(lambda: _entries(unfinished, ranks))
        ranks.on_first(lambda: _finish(unfinished, final, policy, progress, entries))
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            need = sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values()))
            raise _disk_full(error, final, need) from error
        raise
    ranks.on_first(lambda: _delete_old(root, keep, keep_every))
    return final


def load(
    checkpoint: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer | None,
    ranks: Ranks,
) -> Progress:
    """Fill the model of `policy` and its `optimizer` in place; returns where the run stood.

    Collective: every rank reads its own shards, however many ranks wrote them.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    sharded.read(sharded.weights(policy.model), checkpoint, ranks)
    if optimizer is not None and (checkpoint / OPTIMIZER).exists():
        sharded.load_moments(checkpoint / OPTIMIZER, policy.model, optimizer, ranks)
    path = checkpoint / "state.json"
    try:
        return Progress(**json.loads(path.read_text("utf-8")))
    except TypeError as error:
        raise ValueError(f"{path} is of another version of the trainer: {error}") from error


def latest(folder: Path, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint of the run in `folder`; None where it has none at all.

    Collective. Each damaged one is named on stderr, and the one before it used.

    Raises:
        ValueError: there are checkpoints, and all are damaged; a file is in their folder's place.
    """
    root = folder / "checkpoints"
    ranks.on_first(lambda: _check_folder(root))
    damaged = []
    for checkpoint in ranks.on_first(lambda: _checkpoints(root))[::-1]:
        problem = check(checkpoint, ranks)
        if problem is None:
            return checkpoint
        damaged.append(problem)
        if ranks.first:
            print(f"warning: {problem}; trying the checkpoint before it", file=sys.stderr)
    if damaged:
        raise ValueError(
            f"no checkpoint of {folder} is whole: {'; '.join(damaged)}. Put a whole one into "
            f"{root}, or delete {root} to start afresh"
        )
    return None


def find(folder: Path, step: int | None, ranks: Ranks) -> Path:
    """The checkpoint of `step` of the run in `folder`, or the newest whole one; collective.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if step is None:
        if (whole := latest(folder, ranks)) is None:
            raise ValueError(f"{folder} has no checkpoint")
        return whole
    found = ranks.on_first(lambda: steps_of(folder))
    if step not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has {steps}")
    if problem := check(found[step], ranks):
        raise ValueError(problem)
    return found[step]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of the run in `folder`, whole or not; None where it has none."""
    return next(reversed(_checkpoints(folder / "checkpoints")), None)


def check(checkpoint: Path, ranks: Ranks) -> str | None:
    """The problem of `checkpoint`; None if every file is as it was written.

    Collective: each rank reads a share of the files, and all get the same answer.
    """

    def share() -> str | None:
        try:
            files = sorted(manifest.read(checkpoint).items())[ranks.rank :: ranks.size]
        except ValueError as error:
            return str(error)
        problems = (manifest.problem(checkpoint / name, entry) for name, entry in files)
        return next(filter(None, problems), None)

    return next(filter(None, ranks.on_all(share)), None)


def adopt(folder: Path, checkpoint: Path) -> None:
    """Give the run in `folder` a `checkpoint` of another run, in one rename.

    A file is a link to the other's where the file system has such links: no run writes into a file
    of a checkpoint, and each deletes its own.
    """
    root = folder / "checkpoints"
    unfinished = root / (_UNFINISHED + secrets.token_hex(4))
    _begin(unfinished)
    for path in sorted(checkpoint.rglob("*")):
        copied = unfinished / path.relative_to(checkpoint)
        if path.is_dir():
            copied.mkdir(exist_ok=True)
            continue
        try:
            os.link(path, copied)
        except OSError:
            shutil.copy2(path, copied)
    _drop_empty(unfinished)
    _name(unfinished, root / checkpoint.name.removeprefix(_REPLACED))


def steps_of(folder: Path) -> dict[int, Path]:
    """The checkpoints of the run in `folder`, whole or not, by their steps."""
    paths = _checkpoints(folder / "checkpoints")
    return {step_of(path): path for path in paths}


def run_of(path: Path) -> Path | None:
    """The run's folder that `path` is, or that has the checkpoint at `path`; None for others."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return folder if (folder / "run.json").exists() else None


def path_of(folder: Path, step: int) -> Path:
    """Where the run in `folder` has its checkpoint of `step`."""
    return folder / "checkpoints" / f"step-{step:06d}"


def _check_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} must be a folder; it is a file: move it away")


def _begin(unfinished: Path) -> None:
    """A folder to write into; what killed runs left is removed."""
    root = unfinished.parent
    root.mkdir(parents=True, exist_ok=True)
    for killed in root.glob(_UNFINISHED + "*"):
        shutil.rmtree(killed)
    (unfinished / OPTIMIZER).mkdir(parents=True)


def _entries(unfinished: Path, ranks: Ranks) -> dict[str, manifest.Entry]:
    """Size and checksum of the files this rank wrote, by their names in the checkpoint."""
    mine = f"shard-{ranks.rank + 1:05d}-*" if ranks.size > 1 else "*.safetensors"
    return {
        str(path.relative_to(unfinished)): manifest.entry(path) for path in unfinished.rglob(mine)
    }


def _finish(
    unfinished: Path,
    final: Path,
    policy: Policy,
    progress: Progress,
    entries: list[dict[str, manifest.Entry]],
) -> None:
    """Add the files without shards and the manifest, wait for the disk, name the folder."""
    write_settings(unfinished, policy.model, policy.tokenizer, policy.files)
    _drop_empty(unfinished)
    (unfinished / "state.json").write_text(json.dumps(asdict(progress)), "utf-8")
    files = {name: entry for part in entries for name, entry in part.items()}
    if lost := [name for name in files if not (unfinished / name).is_file()]:
        raise ValueError(
            f"{unfinished} lacks {', '.join(lost)}, which other ranks wrote; all ranks need the "
            "run's folder on one file system"
        )
    for path in unfinished.rglob("*"):
        name = str(path.relative_to(unfinished))
        if path.is_file() and name not in files:
            files[name] = manifest.entry(path)
    manifest.write(unfinished, files)
    _name(unfinished, final)


def _drop_empty(unfinished: Path) -> None:
    """Remove the folder of an optimizer that has no state."""
    if not any((unfinished / OPTIMIZER).iterdir()):
        (unfinished / OPTIMIZER).rmdir()


def _name(unfinished: Path, final: Path) -> None:
    """Wait for the disk, then give the folder its name, in the place of one that has it."""
    for path in (*unfinished.rglob("*"), unfinished):
        _sync(path)
    if final.exists():
        replaced = final.with_name(_REPLACED + final.name)
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    unfinished.rename(final)
    _sync(final.parent)


def _delete_old(root: Path, keep: int, keep_every: int) -> None:
    checkpoints = _checkpoints(root)
    replaced = [root / (_REPLACED + path.name) for path in checkpoints]
    for_good = {path for path in checkpoints if keep_every and step_of(path) % keep_every == 0}
    for old in (*(path for path in checkpoints[:-keep] if path not in for_good), *replaced):
        if old.exists():
            # Hidden first: a folder that is partly gone is no checkpoint.
            hidden = old.rename(root / (_UNFINISHED + secrets.token_hex(4)))
            shutil.rmtree(hidden)


def step_of(checkpoint: Path) -> int:
    """The step in the name of `checkpoint`."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(root: Path) -> list[Path]:
    """Oldest first. One that was about to be replaced counts until its successor has the name."""
    found: dict[int, Path] = {}
    for path in sorted(root.glob("*step-*"), reverse=True):
        if name := _NAME.fullmatch(path.name):
            found.setdefault(int(name[1]), path)
    return [path for _, path in sorted(found.items())]


def _disk_full(error: OSError, final: Path, need: int) -> OSError:
    free = shutil.disk_usage(next(path for path in final.parents if path.exists())).free
    return OSError(
        error.errno,
        f"checkpoint {final} could not be written: {error.strerror}; it needs {need:,} bytes, "
        f"{free:,} are free. The checkpoint before it stays: make room, and run the same command",
    )


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
