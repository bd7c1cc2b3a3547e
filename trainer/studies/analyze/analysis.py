"""The settings that all analyses share, and what they work with."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from trainer.evaluation.command import Evaluation, Sets, as_run, load, resolved, sets_of, with_limit
from trainer.launch.lock import owned
from trainer.launch.needs import check_needs
from trainer.policy import Policy
from trainer.ranks import Ranks, join


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


@dataclass(frozen=True)
class Opened(Generic[Settings]):
    """An analysis that has begun."""

    settings: Settings
    """The settings, with defaults resolved."""
    policy: Policy
    sets: Sets
    ranks: Ranks

    @property
    def folder(self) -> Path:
        """The folder of its results, which exists."""
        return Path(self.settings.out)


@contextmanager
def opened(settings: Settings) -> Iterator[Opened[Settings]]:
    """The model and problems of `settings`; results go to `analyses`, by the model's name.

    Raises ValueError for a model or data that cannot be read, and a folder that is in use.
    """
    name = re.sub(r"[^\w.-]+", "-", settings.model).strip("-.")
    settings = replace(settings, out=settings.out or str(Path("analyses") / name))
    with join(settings.device) as ranks, owned(Path(settings.out)):
        asked, settings = settings, resolved(settings, ranks)
        check_needs(as_run(settings))
        policy = load(settings, ranks)
        sets = sets_of(settings, asked, policy)
        settings = with_limit(settings, policy, sets)
        try:
            yield Opened(settings, policy, sets, ranks)
        finally:
            for one in sets.values():
                one.verifier.close()
