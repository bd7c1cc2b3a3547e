"""Several processes that stand among ranks, as torchrun starts them, on this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LIMIT = 200.0  # seconds
ROOT = Path(__file__).parents[2]


def run_ranks(size: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `size` processes, on one thread each.

    They are forked from a process that has imported torch and the trainer.
    """
    folder.mkdir(parents=True)
    port = _free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.trainer.update_cases"])
        processes = [
            context.Process(target=_work, args=(rank, size, port, work, folder, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def next_world() -> None:
    """To be called before these processes join each other again, which takes another port."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _work(rank: int, size: int, port: int, work: Any, folder: Path, arguments: Any) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(work(*arguments), folder / f"{rank}.pt")
