"""placeholder"""

from dataclasses import dataclass

from trainer.evaluation import Evaluation


@dataclass(frozen=True)
class Patterns(Evaluation):
    """placeholder"""


def analyze_patterns(settings: Patterns) -> None:
    """placeholder"""
