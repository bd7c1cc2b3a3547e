"""placeholder"""

from dataclasses import dataclass

from trainer.evaluation import Evaluation


@dataclass(frozen=True)
class Temperatures(Evaluation):
    """placeholder"""


def analyze_temperatures(settings: Temperatures) -> None:
    """placeholder"""
