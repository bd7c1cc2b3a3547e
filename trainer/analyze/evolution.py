"""placeholder"""

from dataclasses import dataclass

from trainer.evaluation import Evaluation


@dataclass(frozen=True)
class Evolution(Evaluation):
    """placeholder"""


def analyze_evolution(settings: Evolution) -> None:
    """placeholder"""
