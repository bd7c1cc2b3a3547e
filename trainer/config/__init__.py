"""The configuration of a run: frozen dataclasses. presets.py has some."""

from trainer.config.algorithm import Algorithm
from trainer.config.data import Data, Reward
from trainer.config.model import Model, Optimizer, WarmStart, is_flash
from trainer.config.run import Config, Eval, Tracking
from trainer.config.sampling import NO_TRUNCATION, Engine, Rollout, Truncation
from trainer.config.sources import Sources, sources

__all__ = [
    "NO_TRUNCATION",
    "Algorithm",
    "Config",
    "Data",
    "Engine",
    "Eval",
    "Model",
    "Optimizer",
    "Reward",
    "Rollout",
    "Sources",
    "Tracking",
    "Truncation",
    "WarmStart",
    "is_flash",
    "sources",
]
