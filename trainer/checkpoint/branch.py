"""A new run from a checkpoint of another: its weights, optimizer, place in the data and metrics.

The new folder gets the rows of metrics.jsonl and samples.jsonl up to the checkpoint, run.json, and
then the checkpoint, each whole or not at all. At first run.json is the other run's, with

    "origin": {"run": its folder, "name", "step", "starts": how many of the starts are its}

so that the first start of the branch notes what has changed, as every start does.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint.resume import read_earlier
from trainer.config import Config
from trainer.log import read_rows, read_run, replace_text
from trainer.ranks import Ranks


@dataclass(frozen=True)
class Origin:
    """Where a branch begins: a run and the step of a checkpoint; None: its last one."""

    run: Path
    step: int | None


def find_origin(text: str) -> Origin:
    """The origin that `text` names: "RUN", "RUN@STEP", or the path of a checkpoint.

    Raises:
        ValueError: it is no run.
    """
    start, _, end = text.rpartition("@")
    named = bool(start) and end.isdigit()
    path = Path(start if named else text)
    if (run := checkpoint.run_of(path)) is None:
        raise ValueError(f"{path / 'run.json'} is missing: no run to branch from")
    if named:
        return Origin(run, int(end))
    return Origin(run, None if run == path else checkpoint.step_of(path))


def branch(text: str, settings: Config, ranks: Ranks) -> None:
    """Lay out the folder of `settings` as a branch from `text`, unless it is one; collective.

    Raises:
        ValueError: no run or whole checkpoint is there, the folder holds another run, or no step is
            left.
    """
    origin = ranks.on_first(lambda: find_origin(text))
    folder = settings.folder
    if ranks.on_first(lambda: _is_done(folder, origin)):
        return
    path = checkpoint.find(origin.run, origin.step, ranks)
    step = checkpoint.step_of(path)
    if settings.steps <= step:
        raise ValueError(f"steps must be more than the {step} of {path}; got {settings.steps}")
    ranks.on_first(lambda: _lay_out(folder, origin.run, path, step))


def _is_done(folder: Path, origin: Origin) -> bool:
    """Whether `folder` is that branch already; ValueError where it is something else."""
    earlier, found = read_earlier(folder), checkpoint.steps_of(folder)
    made = earlier.origin if earlier is not None else None
    if not found and (earlier is None or made is not None):  # nothing, or not laid out to the end
        return False
    if made is None or made["run"] != str(origin.run.resolve()):
        raise ValueError(f"{folder} holds another run; choose another --name for the branch")
    if origin.step not in (None, made["step"]):
        raise ValueError(
            f"{folder} is a branch from step {made['step']}, not {origin.step}; choose another "
            "--name"
        )
    return True


def _lay_out(folder: Path, run: Path, path: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run / name).exists():
            rows = [row for row in read_rows(run / name) if row["step"] <= step]
            replace_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    content = read_run(run)
    content["origin"] = {
        "run": str(run.resolve()),
        "name": content["config"]["name"],
        "step": step,
        "starts": len(content["starts"]),
        **({"origin": content["origin"]} if "origin" in content else {}),
    }
    replace_text(folder / "run.json", json.dumps(content, indent=2) + "\n")
    try:
        checkpoint.adopt(folder, path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} was deleted meanwhile: {run} goes on; give another step"
        ) from error
