"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio, on request."""

import json
import secrets
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.config import Config


@dataclass(frozen=True)
class Start:
    """What a tracker is opened with."""

    project: str
    folder: Path
    """The run's folder, whose name is the run's."""
    id: str
    """The tracked run's id: the same whenever the run resumes, another when it starts afresh."""
    step: int
    """The last step that stays; -1 for a fresh start."""
    config: dict[str, Any]


class Tracker(Protocol):
    """One library."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the finite metrics of `step`."""
        ...

    def close(self) -> None:
        """Send what is left: the run has ended."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard; a resumed run hides what lies after its checkpoint."""

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(start.folder / "tensorboard"), purge_step=max(start.step + 1, 0)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker.write`; on disk at once."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """As `Tracker.close`."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, drawn over "step": its own count only rises, ours is rewound."""

    def __init__(self, start: Start):
        import wandb

        self._run = wandb.init(
            project=start.project,
            name=start.folder.name,
            id=start.id,
            resume="allow",
            dir=str(start.folder),
            config=start.config,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker.write`; a thread sends it."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """As `Tracker.close`."""
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine or where its environment variables say."""

    def __init__(self, start: Start):
        import trackio

        # A run is found again by its name alone.
        self._run = trackio.init(
            project=start.project,
            name=f"{start.folder.name}-{start.id}",
            resume="allow",
            config=start.config,
        )
        self._finish = trackio.finish

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker.write`; a thread stores it."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """As `Tracker.close`."""
        self._finish()


KINDS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


class Trackers:
    """The trackers that a run asks for.

    An error of a tracker during the run is counted, told once per tracker, and stops nothing.
    """

    def __init__(self, settings: Config, folder: Path, step: int):
        """Open them for the steps after `step`; ValueError where one does not start."""
        self.failures = 0
        self._told: set[str] = set()
        self._open: dict[str, Tracker] = {}
        tracking = settings.tracking
        if not tracking.trackers:
            return
        start = Start(tracking.project, folder, _id(folder, step), step, asdict(settings))
        for name in tracking.trackers:
            try:
                self._open[name] = KINDS[name](start)
            # Anything at all: none of the three says what it raises.
            except Exception as error:
                raise ValueError(f"tracker {name!r} does not start: {error}") from error

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add the metrics of `step` that are finite to each."""
        finite = {key: value for key, value in metrics.items() if value is not None}
        self._each(lambda tracker: tracker.write(step, finite))

    def close(self) -> None:
        """The run has ended."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._open.items():
            try:
                call(tracker)
            except Exception as error:
                self.failures += 1
                if name in self._told:
                    continue
                self._told.add(name)
                warnings.warn(
                    f"tracker {name!r} failed, which is told once: {error!r}. metrics.jsonl has "
                    "all",
                    RuntimeWarning,
                    stacklevel=3,
                )


def _id(folder: Path, step: int) -> str:
    """The tracked run's, kept in the folder; a new one for a fresh start."""
    path = folder / "tracking.json"
    if step < 0 or not path.exists():
        path.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", "utf-8")
    try:
        return json.loads(path.read_text("utf-8"))["id"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}; without it a new run is tracked") from error
