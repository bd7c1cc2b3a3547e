"""What vLLM finds at its start: its environment, and threads that it must not take."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import Engine as Settings

TRAINER = "ENTROPY_KERNELS_TRAINER"
"""The environment variable with the trainer's process id: vLLM's processes end with it."""


def backend(settings: Settings, device: torch.device) -> str:
    """The name of vLLM's weight transfer."""
    if device.type == "cpu":
        return "memory_file"
    return "nccl" if settings.devices else "ipc"


def set_environment(settings: Settings, device: torch.device) -> None:
    """Set what vLLM reads from the environment when it is imported or starts."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(settings.placement == "beside"))
    os.environ[TRAINER] = str(os.getpid())
    if settings.placement == "beside" and backend(settings, device) == "ipc":
        # CUDA's handles of memory are objects that msgpack does not know.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


@contextmanager
def own_threads() -> Iterator[None]:
    """Keep torch's threads: vLLM on a CPU takes them, and the function that sets them."""
    set_num_threads, count = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(count)
