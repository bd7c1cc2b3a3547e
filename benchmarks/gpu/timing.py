"""Times on a GPU by events, on a CPU by the clock; contestants alternate."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.rows import Row
from benchmarks.tables import quantile
from entropy_kernels._bench import rounds as rounds_of

WARM_UP = 1
# Fewer have no spread.
LEAST_ROUNDS = 3
Run = Callable[[], Any]


def alternate(
    runs: dict[str, Run], device: torch.device, rounds: int, until: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of each in every round; each round starts with another one.

    The rounds end at `until`, by time.monotonic(), but not before the least number of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    for name, sample in rounds_of.alternate(runs, device, rounds):
        samples[name].append(1e3 * sample.wall_s)
        counts = [len(x) for x in samples.values()]
        if min(counts) == max(counts) >= LEAST_ROUNDS and time.monotonic() > until:
            break
    return samples


def spread(samples: list[float]) -> Row:
    """p50, p20 and p80 of milliseconds, and the samples for ratios within a round."""
    found: Row = {f"p{q}_ms": quantile(samples, q / 100) for q in (50, 20, 80)}
    return found | {"samples_ms": [round(x, 5) for x in samples]}


def timed(run: Run, device: torch.device, rounds: int) -> Row:
    """The spread of one by itself."""
    for _ in range(WARM_UP):
        run()
    return spread([1e3 * rounds_of.once(run, device)[0] for _ in range(rounds)])


def rate(row: Row, units: float, tokens: int, hidden: int, vocabulary: int) -> Row:
    """`row` with the rate of its products, in units of 2 T D V operations."""
    flops = units * 2 * tokens * hidden * vocabulary
    return row | {"units": units, "tflops": flops / row["p50_ms"] / 1e9}


def graph(run: Run) -> Run:
    """The replay of a CUDA graph of `run`, captured after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The allocator's peak above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    return rounds_of.peak_of(run, device)[1]
