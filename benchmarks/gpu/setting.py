"""The setting of every stage: its device, its sizes, and the rows."""

from dataclasses import dataclass

import torch

from benchmarks.gpu.rows import Row, Rows


@dataclass(frozen=True)
class Sizes:
    """What a run measures: T tokens, D hidden."""

    base: tuple[int, int] = (8192, 4096)
    """(T, D) of every contestant."""
    more: tuple[tuple[int, int], ...] = ((8192, 1024), (32768, 4096))
    """(T, D) of ours, eager and torch.compile besides."""
    hidden: tuple[int, ...] = (4096, 1024)
    """D of the floors and of the sweep of tiles."""
    vocabulary: int = 151936
    divided_vocabulary: int = 151552
    """The largest multiple of 1024 below: what verl's kernel computes rightly."""
    entropies: int = 1 << 26
    """How many the threshold is taken over."""
    rounds: int = 12
    dtype: torch.dtype = torch.bfloat16


# To see that every stage runs; no result of them means anything.
QUICK = Sizes((16, 32), ((8, 32), (24, 16)), (32,), 97, 1024, 3000, 1, torch.float32)


@dataclass(frozen=True)
class Setting:
    rows: Rows
    device: torch.device
    quick: bool = False

    @property
    def sizes(self) -> Sizes:
        return sizes(self.quick)


def sizes(quick: bool) -> Sizes:
    return QUICK if quick else Sizes()


def setting_of(rows: Rows, job: Row) -> Setting:
    """The setting of a worker's job, which never takes far more memory than it should."""
    device = here()
    if device.type == "cuda" and job.get("bytes"):
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 2.5 * job["bytes"] / whole))
    return Setting(rows, device, job["quick"])


def here() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
