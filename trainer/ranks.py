"""Where this process stands among those of a run: alone, or one of several under torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


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


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun started, joined for as long as the context lasts; else one alone.

    `device` is "auto" (CUDA where there is one; under torchrun the one of the local rank) or
    torch's name of a device. NCCL on CUDA, else gloo.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(torch.device(kind))
        return
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(kind)
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    try:
        yield Ranks(torch.device(kind), dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()
