"""The files in benchmarks/results/paper/, as docs/paper.md is made of them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

LABELS = ("ladder", "ladder-long")
WHERE = "benchmarks/results/paper"
NOTHING = "Not measured yet."

# Nats: between what follows by rule and the decisions, where both tasks have next to no tokens.
DECISION = 0.3

Found = dict[str, Any]


def read(results: Path, pattern: str) -> list[Found]:
    """The results whose file names match, by name, and so by seed."""
    return [json.loads(path.read_text()) for path in sorted(results.glob(pattern))]


def share_above(entropy: float, found: Found) -> float:
    """The share of tokens above `entropy`, interpolated in the distribution function of a
    patterns.json. Raises ValueError outside of its points."""
    pairs = list(zip(found["cdf"]["points"], found["cdf"]["shares"], strict=True))
    for (low, before), (high, after) in pairwise(pairs):
        if low <= entropy < high:
            return 1 - before - (after - before) * (entropy - low) / (high - low)
    raise ValueError(f"the distribution function has no points around {entropy}")


def image(name: str, text: str) -> str:
    """A figure of docs/paper/ in docs/paper.md."""
    return f"![{text}](paper/{name})"
