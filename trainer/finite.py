"""Nothing poisoned is kept: numbers that are not finite end before weights and checkpoints.

A step of such statistics or gradients is skipped and counted, a number of them in a row ends the
run, and a weight ends it at once: with the step, the tensor, and the checkpoint to go back to.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.ranks import Ranks

# Tensors of which one kernel takes the norms.
_TOGETHER = 256


class NotFinite(ValueError):
    """What must be finite and is not: a sentence without the step."""


@dataclass
class Guard:
    """Counts updates that were skipped in a row, for numbers that were not finite."""

    limit: int
    in_a_row: int = 0

    def count(self, problem: str | None) -> None:
        """An update was skipped for `problem`; None: it was made.

        Raises:
            NotFinite: so were `limit` before it, in a row.
        """
        self.in_a_row = self.in_a_row + 1 if problem else 0
        if problem and self.in_a_row > self.limit:
            raise NotFinite(
                f"{problem}: {self.in_a_row} updates in a row are skipped, and "
                f"optimizer.max_nonfinite is {self.limit}"
            )


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first with NaN or infinity in what this rank holds of it.

    It reads each once: the largest size, in no memory of its own.
    """
    found = [
        (name, tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in tensors
    ]
    found = [(name, t.detach()) for name, t in found if t.is_floating_point() and t.numel()]
    for first in range(0, len(found), _TOGETHER):
        part = found[first : first + _TOGETHER]
        sizes = torch._foreach_norm([tensor for _, tensor in part], torch.inf)
        finite = torch.stack([size.float() for size in sizes]).isfinite().tolist()
        if not all(finite):
            return part[finite.index(False)][0]
    return None


def check_finite(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks, what: str) -> None:
    """Collective.

    Raises:
        NotFinite: on all ranks, where one holds a tensor that is not finite: its name and `what`.
    """
    name = next(filter(None, ranks.gather(first_nonfinite(tensors))), None)
    if name is not None:
        raise NotFinite(f"{name} is not finite {what}")


def nonfinite_statistic(statistics: Mapping[str, Tensor]) -> str | None:
    """The name of the first that is not finite, if any."""
    return next((name for name, x in statistics.items() if not x.isfinite().all()), None)


@contextmanager
def naming_step(step: int, folder: Path) -> Iterator[None]:
    """Say of what is not finite in which step of the run in `folder` that is, and what to do.

    Raises:
        ValueError: for each NotFinite.
    """
    try:
        yield
    except NotFinite as error:
        kept = sorted((folder / "checkpoints").glob("step-*"))
        back = f"go back to {kept[-1]}" if kept else "there is no checkpoint to go back to"
        raise ValueError(f"step {step}: {error}; {back}") from error
