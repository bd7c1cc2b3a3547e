"""The settings that all analyses share, and what they work with."""

import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from trainer.evaluation import command
from trainer.evaluation.command import Evaluation, Opened
from trainer.log import provenance, replace_text


@dataclass(frozen=True)
class Analysis(Evaluation):
    """An evaluation whose entropies are analysed."""

    temperature: float | None = 1.0
    """The temperature of sampling and of the entropies."""
    fraction: float = 0.2
    """The share of the tokens that is called high-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}")
        if self.temperature == 0:
            raise ValueError("entropies are those of a temperature > 0; got temperature 0")


Settings = TypeVar("Settings", bound=Analysis)


def opened(settings: Settings) -> AbstractContextManager[Opened[Settings]]:
    """The model and problems of `settings`; results go to `analyses`, by the model's name.

    Raises ValueError for a model or data that cannot be read, and a folder that is in use.
    """
    name = re.sub(r"[^\w.-]+", "-", settings.model).strip("-.")
    return command.opened(replace(settings, out=settings.out or str(Path("analyses") / name)))


def write(work: Opened[Settings], name: str, found: dict[str, Any], svg: str) -> Path:
    """Put `found`, with the settings and versions, into OUT/`name`.json, and `svg` beside it."""
    made = provenance(str(work.ranks.device))
    path = work.folder / f"{name}.json"
    whole = {"settings": asdict(work.settings), "made": made, **found}
    replace_text(path, json.dumps(whole, indent=1) + "\n")
    replace_text(path.with_suffix(".svg"), svg)
    print(f"results: {path}")
    return path
