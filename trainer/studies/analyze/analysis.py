"""The settings that all analyses share, and what they work with."""

import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from trainer.config import Config, Model
from trainer.config.model import Impl
from trainer.evaluation import command
from trainer.evaluation.command import Evaluation, Opened
from trainer.launch.needs import check_head
from trainer.log import provenance, replace_text


@dataclass(frozen=True)
class Analysis(Evaluation):
    """An evaluation whose entropies are analysed."""

    temperature: float | None = 1.0
    """The temperature of sampling and of the entropies."""
    fraction: float = 0.2
    """The share of the tokens that is called high-entropy."""
    impl: Impl = "auto"
    """The backend that scores tokens and finds thresholds, as `model.impl` of a run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}")
        if self.temperature == 0:
            raise ValueError("entropies are those of a temperature > 0; got temperature 0")


Settings = TypeVar("Settings", bound=Analysis)


def opened(settings: Settings) -> AbstractContextManager[Opened[Settings]]:
    """The model and problems of `settings`; results go to `analyses`, by the model's name.

    Raises ValueError for an `impl` that cannot run here, a model or data that cannot be read, and a
    folder that is in use.
    """
    check_head(Config(device=settings.device, model=Model(impl=settings.impl)))
    name = re.sub(r"[^\w.-]+", "-", settings.model).strip("-.")
    return command.opened(replace(settings, out=settings.out or str(Path("analyses") / name)))


def scoring(settings: Analysis) -> Config:
    """The configuration of a run that samples alike, and scores on the same backend."""
    config = command.engine_config(settings)
    return replace(config, model=replace(config.model, impl=settings.impl))


def write(work: Opened[Settings], name: str, found: dict[str, Any], svg: str) -> Path:
    """Put `found`, with the settings and versions, into OUT/`name`.json, and `svg` beside it."""
    made = provenance(str(work.ranks.device))
    path = work.folder / f"{name}.json"
    whole = {"settings": asdict(work.settings), "made": made, **found}
    replace_text(path, json.dumps(whole, indent=1) + "\n")
    replace_text(path.with_suffix(".svg"), svg)
    print(f"results: {path}")
    return path
