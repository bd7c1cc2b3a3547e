"""The setting of every stage: its device, its sizes, and the rows."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.rows import Rows


@dataclass(frozen=True)
class Setting:
    rows: Rows
    device: torch.device
    out: Path
    """Where the rows, the tools' logs and the records go."""
    quick: bool
    """Tiny shapes, to see that every stage runs; no result of it means anything."""
    tokens: tuple[int, ...] = (8192, 32768)
    hidden: tuple[int, ...] = (1024, 2048, 4096, 5120)
    vocabulary: int = 151936
    divided_vocabulary: int = 151552
    """The largest multiple of 1024 below: what verl's kernel computes rightly."""
    entropies: int = 1 << 26
    """How many the threshold is taken over."""
    rounds: int = 12
    dtype: torch.dtype = torch.bfloat16

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(tokens, hidden), the models that most people train first."""
        order = sorted(self.hidden, key=lambda d: (d != 4096, d != 1024, d))
        return [(t, d) for t in self.tokens for d in order]


def quick_setting(rows: Rows, device: torch.device, out: Path) -> Setting:
    return Setting(
        rows,
        device,
        out,
        quick=True,
        tokens=(24,),
        hidden=(32,),
        vocabulary=301,
        divided_vocabulary=1024,
        entropies=5000,
        rounds=1,
        dtype=torch.float32,
    )
