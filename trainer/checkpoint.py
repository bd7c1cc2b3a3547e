"""Checkpoints of a run: a transformers folder with the optimizer's state beside the weights.

checkpoints/step-000020/   model.safetensors, config.json, tokenizer files; optimizer.safetensors;
                           state.json {"step", "next_problem", "updates"}
A checkpoint appears in one rename, so what has the name is whole. No pickle is written or read.
"""

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from trainer.policy import Policy

_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".unfinished-"


@dataclass
class Progress:
    """Where a run stands, beside its weights."""

    step: int = 0
    """RL steps done."""
    next_problem: int = 0
    """Index of the first training problem not yet used."""
    updates: int = 0
    """Optimizer steps done."""


def save(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Write checkpoint `progress.step` of the run in `folder`, then delete all but `keep`."""
    root = folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{progress.step:06d}"
    for killed in root.glob(_UNFINISHED + "*"):
        shutil.rmtree(killed)
    with tempfile.TemporaryDirectory(dir=root, prefix=_UNFINISHED) as unfinished:
        complete = Path(unfinished) / "checkpoint"
        policy.model.save_pretrained(complete)
        policy.tokenizer.save_pretrained(complete)
        save_file(_optimizer_tensors(optimizer), complete / "optimizer.safetensors")
        (complete / "state.json").write_text(json.dumps(asdict(progress)))
        if final.exists():
            shutil.rmtree(final)
        complete.rename(final)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of the run in `folder`."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def check(checkpoint: Path) -> None:
    """Raise ValueError, naming the file, where a file of `checkpoint` is missing or cut short."""
    weights = sorted(checkpoint.glob("model*.safetensors")) or [checkpoint / "model.safetensors"]
    path = checkpoint / "state.json"
    try:
        load_progress(checkpoint)
        for path in (*weights, checkpoint / "optimizer.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Delete {checkpoint} to resume from the checkpoint "
            "before it"
        ) from error


def load_progress(checkpoint: Path) -> Progress:
    """Where the run stood."""
    return Progress(**json.loads((checkpoint / "state.json").read_text()))


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer`, built over the checkpoint's weights, the state it had."""
    parameters = optimizer.param_groups[0]["params"]
    for name, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, key = name.split(".")
        parameter = parameters[int(index)]
        # AdamW keeps its step count on the CPU.
        moved = value if key == "step" else value.to(parameter.device)
        optimizer.state[parameter][key] = moved


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    return {
        f"{index}.{key}": value.contiguous()
        for index, parameter in enumerate(parameters)
        for key, value in optimizer.state[parameter].items()
    }


def _checkpoints(folder: Path) -> list[Path]:
    paths = (folder / "checkpoints").glob("step-*")
    return sorted(
        (path for path in paths if _NAME.fullmatch(path.name)),
        key=lambda path: int(path.name.removeprefix("step-")),
    )
