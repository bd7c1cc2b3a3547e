"""The products of the head alone, without those of the model around it."""

from collections.abc import Callable
from typing import Any

from entropy_kernels import backends
from entropy_kernels.testing import Watch


class Counted:
    """What each call multiplies, forward and backward, in units of D * V: rows times products."""

    def __init__(self, monkeypatch: Any, hidden: int, vocabulary: int):
        self.forward: list[float] = []
        self.backward: list[float] = []
        self._unit = hidden * vocabulary
        for name, rows in (("forward", self.forward), ("backward", self.backward)):
            monkeypatch.setattr(backends, name, self._counting(getattr(backends, name), rows))

    def _counting(self, function: Callable[..., Any], rows: list[float]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with Watch() as watch:
                found = function(*arguments, **options)
            rows.append(watch.products / self._unit)
            return found

        return run
