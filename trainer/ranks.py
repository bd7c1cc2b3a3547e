"""Where this process stands among those of a run: alone, or one of several under torchrun."""

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# How long a rank waits for the others, such as for the last one's sampling or the first one's warm
# start.
PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`; `group` is None where it is alone."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks, on all of them; collective."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, in place, added up over the ranks; collective."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def on_all(self, call: Callable[[], T]) -> list[T]:
        """What `call` returns on each rank; an error of one rank is raised on all. Collective.

        The first rank that has failed is the `teller` of the others' errors.
        """
        outcome: T | Exception
        try:
            outcome = call()
        except Exception as error:
            outcome = error
        outcomes = self.gather(_sendable(outcome) if self.group is not None else outcome)
        for rank, other in enumerate(outcomes):
            if isinstance(other, Exception):
                own = outcome if isinstance(outcome, Exception) else other
                own.teller = rank  # type: ignore[attr-defined]
                raise own
        return outcomes  # type: ignore[return-value]

    def on_first(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises on the first rank, which alone runs it; collective."""
        return self.on_all(lambda: call() if self.first else None)[0]  # type: ignore[return-value]


def local_ranks() -> int:
    """How many processes of the run this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def join(device: str = "auto", group: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined for as long as the context lasts; else one alone.

    `device` is "auto" (CUDA where there is one; under torchrun the one of the local rank) or
    torch's name of a device. NCCL on CUDA, else gloo. With `group` a process
    that is alone has a group too.

    Raises:
        ValueError: there is no such device here, or it cannot be shared out among ranks.
    """
    several = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    kind = _checked(device, group=several or group, several=several)
    if not several and not group:
        yield Ranks(torch.device(kind))
        return
    if kind.startswith("cuda"):
        torch.cuda.set_device(kind)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "nccl" if kind.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, **({} if several else alone))
    try:
        yield Ranks(torch.device(kind), dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        if dist.is_initialized():  # An engine in this process may have ended it.
            dist.destroy_process_group()


def _checked(device: str, group: bool, several: bool) -> str:
    """torch's name of `device` for this process; ValueError where there is none."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name, _, index = kind.partition(":")
    if group and name not in ("cpu", "cuda"):
        raise ValueError(
            f'device must be "auto", "cuda" or "cpu" for several ranks and for '
            f"model.compute_dtype; got {device!r}"
        )
    if several and index:
        raise ValueError(
            f'device must be "auto", "cuda" or "cpu" under torchrun, which gives each rank its '
            f"own; got {device!r}"
        )
    if group and kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        found = torch.empty(0, device=kind).is_meta
        problem = "it has no values" if found else ""
    # Any exception: each backend of torch has its own for a device that is missing.
    except Exception as error:
        problem = re.split(r"\. |\n", str(error).strip())[0]
    if problem:
        raise ValueError(
            f'device must be "auto" or one that torch has here, such as "cpu"; got {kind!r}: '
            f"{problem}"
        )
    return kind


def _sendable(outcome: Any) -> Any:
    """`outcome`; a RuntimeError in place of an exception that cannot be pickled."""
    if isinstance(outcome, Exception):
        try:
            pickle.loads(pickle.dumps(outcome))
        except Exception:
            return RuntimeError(f"{type(outcome).__name__}: {outcome}")
    return outcome
