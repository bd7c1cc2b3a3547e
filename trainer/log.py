"""The files of a run: run.json, metrics.jsonl and samples.jsonl in `runs/<name>/`.

run.json       {"config": resolved configuration, "starts": [{"time", "commit", "dirty", "versions",
               "platform", "device", "step", "directory", "inputs", "left_out", "changes"}]}: one
               entry each time the folder was opened, so a resumed run tells of every machine and
               commit that made it, and of every setting that changed on the way,
               {name: [was, now]}. A branch has "origin" too (branch.py).
metrics.jsonl  one object per step, "step" first, then flat "group/name" keys; what is not finite is
               null and counted under "log/nonfinite".
samples.jsonl  one object per sampled response: "step" and the fields of `Sample`; "entropy" and
               "selected" of those that were trained on.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels
from trainer.config import Config
from trainer.errors import naming
from trainer.report.trackers import Trackers

_KEY = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9_.]+)?")


@dataclass(frozen=True)
class Sample:
    """One sampled response and its tokens."""

    prompt: str
    """The text the model was given."""
    response: str
    """What it answered."""
    reward: float
    """The verdict on the response."""
    tokens: Sequence[str]
    """Each token of the response as decoded text."""
    entropy: Sequence[float]
    """Each token's entropy in nats; empty for a response that was not trained on."""
    selected: Sequence[bool]
    """Whether the loss was taken at each token; as `entropy`."""
    kind: str = ""
    """One of skips.KINDS."""


class RunLog:
    """Writes to a run's folder and its trackers. Every write to the folder is flushed."""

    def __init__(self, folder: Path, config: Config | None = None):
        self.folder = folder
        self._config = config
        self._trackers: Trackers | None = None
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: Config,
        device: str = "",
        record: Mapping[str, Any] | None = None,
    ) -> "RunLog":
        """Create `folder` where it is missing and note in run.json what starts now.

        `device` names the hardware; `record` is added to the entry of this start. Metrics of an
        earlier start stay: call `rewind` with the step to go on from.
        """
        log = cls(Path(folder), config)
        log.folder.mkdir(parents=True, exist_ok=True)
        path = log.folder / "run.json"
        earlier = read_run(log.folder) if path.exists() else {"starts": []}
        starts = [*earlier["starts"], provenance(device) | dict(record or {})]
        run = earlier | {"config": asdict(config), "starts": starts}
        replace_text(path, json.dumps(run, indent=2) + "\n")
        return log

    def write(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Append one row to metrics.jsonl: numbers or one-element tensors under flat keys.

        Values that are not finite become null; a row that has any says how many under
        "log/nonfinite". What trackers failed at since the last row is its "log/tracker_failures".
        Raises ValueError without an integer "step", for a key that is not "name" or "group/name",
        and for a value that is not one number.
        """
        row = {key: _number(key, value) for key, value in metrics.items()}
        step = row.pop("step", None)
        if not isinstance(step, int):
            raise ValueError(f"a row of metrics needs an integer step, got {step!r}")
        if lost := sum(value is None for value in row.values()):
            row["log/nonfinite"] = lost
        if self._trackers and self._trackers.failures:
            row["log/tracker_failures"] = self._trackers.failures
            self._trackers.failures = 0
        _append(self.metrics_path, [{"step": step, **row}])
        if self._trackers:
            self._trackers.write(step, row)

    def close(self) -> None:
        """Tell the trackers that the run has ended."""
        if self._trackers:
            self._trackers.close()

    def samples(self, step: int, rows: Iterable[Sample]) -> None:
        """Append `rows`, the responses sampled at `step`, to samples.jsonl."""
        lines = []
        for row in rows:
            tokens, entropies, flags = map(len, (row.tokens, row.entropy, row.selected))
            if entropies != flags or entropies not in (0, tokens):
                raise ValueError(
                    "a sample needs an entropy and a selected flag per token, or neither; got "
                    f"{tokens} tokens, {entropies} entropies and {flags} flags"
                )
            line: dict[str, Any] = {"step": step, **asdict(row)}
            line["reward"] = _finite(row.reward)
            line["entropy"] = [_finite(value) for value in row.entropy]
            if not row.entropy:
                del line["entropy"], line["selected"]
            lines.append(line)
        _append(self.samples_path, lines)

    def rewind(self, step: int) -> None:
        """Drop every row after `step`, the checkpoint's, and a last line torn by a kill.

        Each file is replaced at once or not at all. `rewind(-1)` empties them for a fresh start.
        The trackers are opened here, to go on after `step`; ValueError where one does not start.
        """
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                replace_text(path, _lines(row for row in read_rows(path) if row["step"] <= step))
        if self._config is not None:
            self._trackers = Trackers(self._config, self.folder, step)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of the run in `folder`.

    Raises ValueError, naming the file and what helps, where it is missing or not what it should be.
    """
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text("utf-8"))
        steps, starts = run["config"]["steps"], run["starts"]
        if not isinstance(steps, int) or not all(isinstance(start, dict) for start in starts):
            raise TypeError("its config has a number of steps, and its starts are objects")
        starts[-1]
    except (FileNotFoundError, NotADirectoryError):
        raise _no_run(folder) from None
    except (ValueError, TypeError, LookupError) as error:
        raise other_version(path, error) from error
    return run


def _no_run(folder: Path) -> ValueError:
    """The error for a `folder` without run.json; it says what `folder` is."""
    wanted = "wanted the folder of a run, such as runs/tiny"
    if not folder.exists():
        return ValueError(f"{folder} does not exist: {wanted}")
    if not folder.is_dir():
        return ValueError(f"{folder} is a file: {wanted}")
    runs = sorted(found.parent for n in (1, 2, 3) for found in folder.glob("*/" * n + "run.json"))
    if runs:
        return ValueError(
            f"{folder} holds {len(runs)} run{'s' * (len(runs) > 1)}, and is not one: choose "
            f"{', '.join(map(str, runs[:3]))}{' or another' * (len(runs) > 3)}"
        )
    return ValueError(f"{folder / 'run.json'} is missing: {folder} is not the folder of a run")


def other_version(path: Path, error: Exception) -> ValueError:
    """The error for a `path`, a file or a run's folder, that `error` has found damaged."""
    return ValueError(
        f"{path} is damaged, or of another version of the trainer: {type(error).__name__}, {error}."
        " Put a copy of it there, or take another folder"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl or samples.jsonl; a torn last line is left out.

    Raises ValueError, naming file and line, for any other line that is not a row.
    """
    try:
        # Not splitlines(): it would also break at separators that JSON allows inside a string.
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise other_version(path, error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        # split leaves an empty text behind the last line that is whole.
        if line.strip():
            row = parse_row(path, line, f"line {number}", whole=number < len(lines))
            rows += [] if row is None else [row]
    return rows


def parse_row(path: Path, line: str | bytes, place: str, whole: bool) -> dict[str, Any] | None:
    """The row in a `line` of metrics.jsonl or samples.jsonl; None for one that a kill has torn.

    Raises ValueError, naming file and `place`, for any other that is not a row.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        if not whole:
            return None
        problem: str | None = f"not JSON: {error}"
    except UnicodeDecodeError as error:
        raise other_version(path, error) from error
    else:
        problem = _problem(row, str(line), is_sample=path.name == "samples.jsonl")
    if problem:
        raise ValueError(
            f"{path}, {place}: {problem}. Take the line out, or put a copy of the file there"
        )
    return row


def _problem(row: Any, line: str, is_sample: bool) -> str | None:
    """What is wrong with a row."""
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return f"a row needs an integer step, got {line[:80]}"
    if is_sample:
        lengths = {len(row[name]) for name in ("tokens", "entropy", "selected") if name in row}
        return f"lists of different lengths, {sorted(lengths)}" if len(lengths) > 1 else None
    for key, value in row.items():
        if value is not None and not isinstance(value, (int, float)):
            return f"{key} is no number, but {value!r:.80}"
    return None


def _number(key: str, value: float | Tensor) -> float | None:
    if not _KEY.fullmatch(key):
        raise ValueError(f'a metric is called "name" or "group/name", got {key!r}')
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{key}: a metric is one number, got shape {tuple(value.shape)}")
        value = value.item()
    if not isinstance(value, (int, float)):
        raise ValueError(f"{key}: a metric is one number, got {type(value).__name__}")
    return _finite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    append_text(path, _lines(rows))


def replace_text(path: Path, text: str) -> None:
    """Put `text` at `path`: a kill leaves the old file or the new one, and so do two at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Add `text` to the end of the file at `path`."""
    with naming(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def provenance(device: str) -> dict[str, Any]:
    """Time, commit, versions and machine of what starts now."""
    commit, dirty = _commit()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": importlib.metadata.version("transformers"),
            "entropy_kernels": entropy_kernels.__version__,
        },
        "platform": platform.platform(),
        "device": device,
    }


def _commit() -> tuple[str, bool | None]:
    """The commit of the checkout this file belongs to and whether tracked files were edited.

    ("unknown", None) where the file is not tracked by git or git is missing.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
