"""A run on Even, in a process of its own: its placement, its folder and its steps."""

import sys
from pathlib import Path

from tests.trainer.small import train_even
from tests.trainer.vllm_cases import configure

if __name__ == "__main__":
    placement, root, steps = sys.argv[1:]
    train_even(configure(Path(root), placement, steps=int(steps)))
