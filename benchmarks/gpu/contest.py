"""A contest: each entry is checked and timed alone, then all that were right in alternation.

An entry has its row as soon as it was looked at. The alternation adds one more to each: whatever
drifts there, drifts for all.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import correctness, timing
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting
from benchmarks.tables import quantile

# Beyond this share of the memory an entry's blocks would push the others' out: timed alone.
CROWDED = 0.4
# How often an entry is timed by itself.
ROUNDS = 5
ALTERNATION = "alternation"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """What is timed."""

    name: str
    look: Callable[[], Row]
    """Checks its result; values of its row."""
    call: Call
    kernels: tuple[str, ...] = ()
    """Ours that it runs: refused where one of them failed correctness."""
    units: float = 0.0
    """Products of T x D x V it takes; 0 where its rate is of no interest."""


def hold(
    setting: Setting,
    stage: str,
    group: str,
    entries: Sequence[Entry],
    shape: dict[str, int],
    base: str = "",
) -> None:
    """Rows of all entries. `base` is the entry that the others' times are divided into."""
    rows = setting.rows
    for entry in entries:
        rows.measure(stage, entry.name, partial(_alone, setting, entry, shape), **shape)
    # A row of its own says that it is done, or why it ended.
    name = f"{ALTERNATION} {group}"
    rows.measure(stage, name, partial(_alternate, setting, stage, group, entries, shape, base))


def _alone(setting: Setting, entry: Entry, shape: dict[str, int]) -> Row:
    refusal = correctness.refusal(setting.rows, entry.kernels)
    if refusal:
        return {"refused": refusal}
    try:
        row = entry.look()
        row |= timing.timed(entry.call, setting.device, min(ROUNDS, setting.sizes.rounds))
    finally:
        clear(setting.device)
    return timing.rate(row, entry.units, **shape) if entry.units else row


def _alternate(
    setting: Setting,
    stage: str,
    group: str,
    entries: Sequence[Entry],
    shape: dict[str, int],
    base: str,
) -> Row:
    rows = setting.rows
    alone = {entry.name: rows.of(stage, name=entry.name, **shape)[0] for entry in entries}
    together = {
        entry.name: entry.call
        for entry in entries
        if "p50_ms" in alone[entry.name] and not _is_crowded(setting, alone[entry.name])
    }
    samples = timing.alternate(together, setting.device, setting.sizes.rounds, rows.until)
    for entry in entries:
        if entry.name not in samples or rows.of(stage, name=entry.name, alternated=group, **shape):
            continue
        row = alone[entry.name] | timing.spread(samples[entry.name])
        row = timing.rate(row, entry.units, **shape) if entry.units else row
        if base in samples:
            pairs = zip(samples[base], samples[entry.name], strict=True)
            row["base_share"] = quantile((x / y for x, y in pairs), 0.5)
        values = {k: v for k, v in row.items() if k not in ("stage", "name", "about")}
        rows.add(stage, entry.name, **values | {"alternated": group})
    return {"entries": len(together), "rounds": max(map(len, samples.values()), default=0)}


def _is_crowded(setting: Setting, row: Row) -> bool:
    if not row.get("peak_bytes") or setting.device.type != "cuda":
        return False
    whole = torch.cuda.get_device_properties(setting.device).total_memory
    return row["peak_bytes"] > CROWDED * whole


def clear(device: torch.device) -> None:
    """Leaves the GPU's memory to who comes next."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
