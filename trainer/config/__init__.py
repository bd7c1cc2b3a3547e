"""The configuration of a run: frozen dataclasses. presets.py has some."""

from trainer.config.algorithm import Algorithm
from trainer.config.data import Data, Reward
from trainer.config.model import Model, Optimizer, WarmStart, is_flash
from trainer.config.run import Config, Eval, Tracking
from trainer.config.sampling import Engine, Rollout

__all__ = [
    "Algorithm",
    "Config",
    "Data",
    "Engine",
    "Eval",
    "Model",
    "Optimizer",
    "Reward",
    "Rollout",
    "Tracking",
    "WarmStart",
    "is_flash",
]
