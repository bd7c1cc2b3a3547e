"""Times on a GPU by events, on a CPU by the clock; contestants alternate."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.rows import Row, quantile

WARM_UP = 2
Run = Callable[[], Any]


def alternate(runs: dict[str, Run], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each in every round; each round starts with another one."""
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(WARM_UP):
            runs[name]()
    for number in range(rounds):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            samples[name].append(once(runs[name], device))
    return samples


def once(run: Run, device: torch.device) -> float:
    """Milliseconds of one call, everything it started included."""
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def spread(samples: list[float]) -> Row:
    """p50, p20 and p80 of milliseconds, and the samples for ratios within a round."""
    found: Row = {f"p{q}_ms": quantile(samples, q / 100) for q in (50, 20, 80)}
    return found | {"samples_ms": [round(x, 5) for x in samples]}


def timed(run: Run, device: torch.device, rounds: int) -> Row:
    """The spread of one that has no competitor."""
    return spread(alternate({"it": run}, device, rounds)["it"])


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
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
