"""Which points of a large grid of parameters run with `--sampled`."""

import zlib
from collections.abc import Mapping

LONG = 8


def sample(grid: Mapping[str, Mapping[str, int]], share: float) -> set[str]:
    """The names of the points that run, the same ones each time.

    They are a `share` of the grid, and more where that takes for every value of every axis. An
    axis of more than LONG values, and of more than the share has points, need not have them all.

    grid: each point's name, with the number of its value on each axis.
    """
    values = {axis: {point[axis] for point in grid.values()} for axis in _axes(grid)}
    covered = [axis for axis in values if len(values[axis]) <= max(LONG, share * len(grid))]
    left = {(axis, value) for axis in covered for value in values[axis]}
    kept = set()
    for name in sorted(grid, key=_draw):
        new = left & grid[name].items()
        if new or _draw(name) < share:
            kept.add(name)
            left -= new
    return kept


def _axes(grid: Mapping[str, Mapping[str, int]]) -> list[str]:
    return sorted(set().union(*grid.values()))


def _draw(name: str) -> float:
    """A number of [0, 1) that a name always has."""
    return zlib.crc32(name.encode()) / 2**32
