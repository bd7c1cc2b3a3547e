"""The lines that a run prints: what it does at its start, and how far it came when stopped."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer import checkpoint
from trainer.config import Config
from trainer.config.changes import Change
from trainer.launch.stop import Stopped, cause, overtaken
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.tasks.problem import Task

if TYPE_CHECKING:
    from trainer.run import Run

LARGEST_ERROR = 0.05
"""The standard error of an accuracy above which a line warns of too few problems."""


def say_start(settings: Config, folder: Path, found: Path | None, ranks: Ranks) -> None:
    """Print, before the model is read, the folder and whether the run starts or goes on."""
    if not ranks.first:
        return
    print(f"run      {folder}: metrics.jsonl, samples.jsonl, report.html")
    print(f"start    {_from(settings, found)}")


def say_parts(
    settings: Config,
    policy: Policy,
    task: Task,
    ranks: Ranks,
    left_out: Mapping[str, int],
    changes: Sequence[Change],
) -> None:
    """Print, once model and data are read, their sizes, what has changed since the last start, and
    warnings."""
    if not ranks.first:
        return
    print(f"model    {_model(settings, policy)}")
    known = "endless" if task.num_train is None else f"{task.num_train:,}"
    print(f"data     {settings.data.task}: {known} to train on, {task.num_test:,} held out")
    for count, why in (
        (getattr(task, "repeated", 0), "came before; the first answer counts"),
        (getattr(task, "in_both", 0), "is held out too"),
    ):
        if count:
            print(f"         left out: {count:,} row{'s' * (count > 1)} whose prompt {why}")
    for split, count in left_out.items():
        if count:
            print(f"         left out of {split}: {count:,} prompts over data.max_prompt_tokens")
    print(f"devices  {_devices(settings, ranks)}")
    for change in changes:
        print(f"changed  {change}" + (f" ({change.note})" if change.note else ""))
    print(*policy.notes(), sep="", end="", file=sys.stderr)
    asked, count = settings.eval.problems, min(settings.eval.problems, task.num_test)
    if count < asked:
        print(f"warning: eval.problems is {asked:,}; held out: {count:,}", file=sys.stderr)
    # The error of a share of one half, which is the largest.
    if (error := 0.5 / math.sqrt(max(count, 1))) > LARGEST_ERROR:
        print(
            f"warning: an accuracy on {count} held-out problem{'s' * (count > 1)} has a standard "
            f"error of up to {100 * error:.0f} points",
            file=sys.stderr,
        )


@contextmanager
def stop_is_told(run: "Run") -> Iterator[None]:
    """Raise the end by a signal as `Stopped`, with the step and the last checkpoint."""
    try:
        yield
    except BaseException as error:
        if fault := overtaken(error):
            raise fault from None
        if (number := cause(error)) is None:
            raise
        raise Stopped(number, _where(run, error)) from error


def _from(settings: Config, found: Path | None) -> str:
    if found is None:
        return f"fresh, {settings.steps:,} steps"
    step = int(found.name.rpartition("-")[2])
    if step >= settings.steps:
        return f"all {settings.steps:,} steps are done ({found}); a larger --steps goes on"
    return f"resuming at step {step:,} of {settings.steps:,} ({found})"


def _model(settings: Config, policy: Policy) -> str:
    parameters = list(policy.model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    dtype, compute = settings.model.dtype, settings.model.compute_dtype
    return ", ".join(
        [
            f"{settings.model.path} ({type(policy.model).__name__.removeprefix('FSDP')})",
            f"{_millions(count)} parameters",
            *([] if trained == count else [f"{_millions(trained)} of them trained"]),
            dtype if compute in (None, dtype) else f"{dtype}, computing in {compute}",
            *([f"{positions:,} positions"] if positions else []),
        ]
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _devices(settings: Config, ranks: Ranks) -> str:
    device, engine = ranks.device, settings.engine
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    place = f" {engine.placement}" if engine.kind == "vllm" else ""
    several = f"{ranks.size} ranks" if ranks.size > 1 else "1 process"
    return f"{several} x {kind}, sampling with {engine.kind}{place}"


def _where(run: "Run", error: BaseException) -> str:
    """How far the run has come, and what it goes on from."""
    step, steps = run.progress.step, run.settings.steps
    saved = checkpoint.newest(run.folder)
    done = saved is not None and saved == checkpoint.path_of(run.folder, step)
    place = f"{'after' if done else 'in'} step {step:,} of {steps:,}"
    if not isinstance(error, KeyboardInterrupt):
        place += f", which failed ({type(error).__name__}: {error})"
    return f"{place}; the last checkpoint is {saved or 'still to come'}"
