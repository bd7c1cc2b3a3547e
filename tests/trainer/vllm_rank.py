"""A run on Even, for torchrun to start on each rank: its placement and its folder."""

import sys
from pathlib import Path

from tests.trainer.small import train_even
from tests.trainer.vllm_cases import configure

if __name__ == "__main__":
    placement, root = sys.argv[1:]
    train_even(configure(Path(root), placement, steps=2))
