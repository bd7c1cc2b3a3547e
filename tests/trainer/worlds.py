"""Several processes that stand among ranks, as torchrun starts them, on this machine."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import forkserver

LIMIT = 900.0  # seconds
WORLDS = 8  # that the processes of one call can join, one after the other
ROOT = Path(__file__).parents[2]
_ports: list[int] = []  # of the worlds to come


def meeting() -> dist.TCPStore:
    """Where ranks find each other, in the process that starts them; `port` is its own at once.

    A port that is looked for first and opened by a rank later may be another's by then.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of a rank, which meets the others at the `meeting` of that port."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    there = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in names.items()} | there


def run_ranks(size: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `size` processes, on one thread each.

    They are forked from a process that has imported torch and the trainer.
    """
    folder.mkdir(parents=True)
    meetings = [meeting() for _ in range(WORLDS)]
    ports = [store.port for store in meetings]
    processes = [
        forkserver().Process(target=_work, args=(rank, size, ports, work, folder, arguments))
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
    """To be called before these processes join each other again, which takes another meeting."""
    os.environ["MASTER_PORT"] = str(_ports.pop())


def _work(rank: int, size: int, ports: list[int], work: Any, folder: Path, arguments: Any) -> None:
    _ports[:] = ports
    os.environ |= place(rank, size, _ports.pop())
    torch.set_num_threads(1)
    torch.save(work(*arguments), folder / f"{rank}.pt")
