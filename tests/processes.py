"""Processes of tests, forked from one that has imported already what takes seconds to import."""

import contextlib
import functools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[1]
# One process serves all tests of a worker; what is not installed is left out.
IMPORTED = [
    "entropy_kernels",
    "torch.distributed.fsdp",
    "transformers",
    "accelerate",
    "tests.trainer.small",
    "tests.trainer.update_cases",
]


@functools.cache
def forkserver() -> ForkServerContext:
    """Where such processes come from."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context.set_forkserver_preload(IMPORTED)
        process = context.Process(target=print)
        process.start()
        process.join()
    return context


def spawn(work: Callable[..., Any], args: tuple[Any, ...], nprocs: int) -> None:
    """torch.multiprocessing.spawn: `work(rank, *args)` in each of `nprocs` processes."""
    forkserver()
    start_processes(work, args, nprocs, start_method="forkserver")


@contextlib.contextmanager
def meeting(rank: int, folder: Path, ranks: int) -> Iterator[None]:
    """A process group over `ranks` processes of one thread each; this one is `rank`."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def save_by_groups(
    rank: int,
    folder: Path,
    sizes: Iterable[int],
    results_of: Callable[[dist.ProcessGroup, int], object],
) -> None:
    """Saves results_of(group, size) on each rank of groups of the first `size` ranks."""
    for size in sizes:
        group = dist.new_group(range(size))
        if rank < size:
            torch.save(results_of(group, size), f"{folder}/{size}-{rank}.pt")


def results_by_rank(folder: Path, size: int) -> list[Any]:
    """What `save_by_groups` saved for the group of `size` ranks."""
    files = [folder / f"{size}-{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) for file in files]


def kill_after(operations: int) -> None:
    """Kill this process with its first operation on files after so many from now on."""
    left = operations

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" or event.startswith("os."):
            left -= 1
            if left < 0:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(count)
