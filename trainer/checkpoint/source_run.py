"""The run that a model comes from, and its settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint import run_of
from trainer.config import Data, Engine, Eval, Model, Reward, Rollout
from trainer.log import other_version, read_run

_PARTS = {kind.__name__.lower(): kind for kind in (Data, Reward, Model, Rollout, Eval, Engine)}


@dataclass(frozen=True)
class SourceRun:
    """A run, by its run.json."""

    folder: Path
    seed: int
    data: Data
    reward: Reward = field(default_factory=Reward)
    model: Model = field(default_factory=Model)
    rollout: Rollout = field(default_factory=Rollout)
    eval: Eval = field(default_factory=Eval)
    engine: Engine = field(default_factory=Engine)
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
            **{name: _part(config.get(name, {}), kind) for name, kind in _PARTS.items()},
            digest=inputs.get("data", ""),
        )
    except (KeyError, TypeError) as error:
        raise other_version(folder / "run.json", error) from error


def _part(found: dict[str, Any], kind: type[Any]) -> Any:
    """The settings of `kind`; defaults stand for those that an earlier version lacked."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
