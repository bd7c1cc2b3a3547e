"""The run that a model comes from, and its settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainer.checkpoint import run_of
from trainer.config import Data, Engine, Eval, Model, Reward, Rollout
from trainer.log import other_version, read_run

Part = TypeVar("Part", Data, Engine, Eval, Model, Reward, Rollout)


@dataclass(frozen=True)
class SourceRun:
    """A run, by its run.json."""

    folder: Path
    seed: int
    data: Data
    reward: Reward
    model: Model
    rollout: Rollout
    eval: Eval
    engine: Engine
    digest: str = ""
    """The digest of its data's contents at the last start."""

    @property
    def sampled_in(self) -> Literal["float32", "bfloat16"]:
        """The dtype in which its policy sampled."""
        return self.model.compute_dtype or self.model.dtype


def source_run(model: str) -> SourceRun | None:
    """The run whose folder, or whose checkpoint, `model` is; None where it is neither.

    Raises ValueError where run.json is damaged, or of another version of the trainer.
    """
    folder = run_of(Path(model))
    if folder is None:
        return None
    written = read_run(folder)
    config, inputs = written["config"], written["starts"][-1].get("inputs") or {}
    try:
        return SourceRun(
            folder,
            config["seed"],
            _part(config, Data),
            _part(config, Reward),
            _part(config, Model),
            _part(config, Rollout),
            _part(config, Eval),
            _part(config, Engine),
            inputs.get("data", ""),
        )
    except (KeyError, TypeError) as error:
        raise other_version(folder / "run.json", error) from error


def _part(config: dict[str, Any], kind: type[Part]) -> Part:
    """The settings of `kind`; defaults stand for those that an earlier version lacked."""
    found = config.get(kind.__name__.lower(), {})
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return kind(**values)
