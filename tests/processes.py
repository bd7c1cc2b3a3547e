"""Processes of tests, forked from one that has imported already what takes seconds to import."""

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
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
