"""Weights sent to vLLM's own process: its weight transfer, and one for the CPU.

vLLM's transfers need a GPU: CUDA's memory handles on one GPU, NCCL to others. The transfer for the
CPU makes the same calls with files in memory.
"""

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from entropy_kernels.integrations.vllm_worker import WorkerExtension as EntropyExtension
from trainer.config import Engine as Settings
from trainer.engines.vllm_setup import TRAINER
from trainer.policy import Policy

MEMORY_FILE = "memory_file"
CHUNK_BYTES = 2**28


def options(backend: str) -> dict[str, Any]:
    """Options of vLLM's LLM that choose the transfer."""
    return {
        "weight_transfer_config": WeightTransferConfig(backend=backend),
        # Each worker imports it before it makes its end of the transfer: this module registers one.
        "worker_extension_cls": f"{__name__}.WorkerExtension",
    }


def pusher(
    llm: Any, backend: str, policy: Policy, settings: Settings
) -> Callable[[Iterable[tuple[str, Tensor]]], None]:
    """A function that gives weights to `llm`, whose workers end the transfer `backend`."""
    source = _Source(policy)
    transfer = WeightTransferTrainerFactory.trainer_init(
        _init_info(backend, settings), client=_Client(llm), source=source
    )

    def push(weights: Iterable[tuple[str, Tensor]]) -> None:
        source.weights = weights
        transfer.send_weights()
        source.weights = ()

    return push


def repack_tied_head(model: torch.nn.Module) -> None:
    """Pack the head again: vLLM on a CPU does not where it is tied to what was reloaded."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension(EntropyExtension):
    """Adds nothing more to vLLM's worker than the import of this module."""


def _end_with(trainer: int) -> None:
    """End a worker, and the engine above it, as soon as the trainer ends, even if it is killed."""
    engine = os.getppid()

    def wait() -> None:
        select.select([os.pidfd_open(trainer)], [], [])
        if engine not in (1, trainer) and os.getppid() == engine:
            os.kill(engine, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Client:
    """The engine's end of the calls, by name."""

    def __init__(self, llm: Any):
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, **arguments: Any) -> None:
        self._llm.collective_rpc(method, kwargs=arguments)


class _Source(WeightSource):
    """The weights of one push, in the order of the parameters of `policy`."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self.weights: Iterable[tuple[str, Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, self._policy.compute_dtype or p.dtype, tuple(p.shape))
            for name, p in self._policy.model.named_parameters()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights)


def _init_info(backend: str, settings: Settings) -> TrainerInitInfo:
    """Every rank has an engine of its own, and is the first of its transfer's."""
    if backend == MEMORY_FILE:
        return MemoryFileTrainerInitInfo(rank=0)
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=0)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    size = 1 + settings.tensor_parallel
    return NCCLTrainerInitInfo("127.0.0.1", _free_port(), size, rank=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class MemoryFileTrainerInitInfo(TrainerInitInfo):
    """Nothing to agree upon."""

    backend: ClassVar[str] = MEMORY_FILE


@dataclass
class MemoryFileInitInfo(WeightTransferInitInfo):
    """Nothing to agree upon."""


@dataclass
class MemoryFileUpdateInfo(WeightTransferUpdateInfo):
    """Where some of the weights are."""

    path: str


class MemoryFileTrainerEngine(TrainerWeightTransferEngine[MemoryFileTrainerInitInfo]):
    """The trainer's end: safetensors files in memory, of up to `CHUNK_BYTES` and a tensor."""

    init_info_cls = MemoryFileTrainerInitInfo

    @classmethod
    def trainer_init(
        cls, init_info: MemoryFileTrainerInitInfo, *, client: Any, source: Any = None
    ) -> "MemoryFileTrainerEngine":
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source)

    def send_weights(self) -> None:
        assert self.source is not None
        self.client.start_weight_update()
        for chunk in _chunks(self.source):
            with _memory_file(safetensors.torch.save(chunk)) as path:
                self.client.update_weights({"path": path})
        self.client.finish_weight_update()


class MemoryFileEngine(WeightTransferEngine[MemoryFileInitInfo, MemoryFileUpdateInfo]):
    """The worker's end."""

    init_info_cls = MemoryFileInitInfo
    update_info_cls = MemoryFileUpdateInfo

    def init_transfer_engine(self, init_info: MemoryFileInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Like the base class, without its wait for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: MemoryFileUpdateInfo) -> None:
        self.model.load_weights(safetensors.torch.load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing to do."""


def _chunks(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        chunk[name] = tensor.contiguous()
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """The path, for processes of this user, of a file that goes when its last reader does."""
    descriptor = os.memfd_create("weights")
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{descriptor}"


for _factory, _end in (
    (WeightTransferEngineFactory, MemoryFileEngine),
    (WeightTransferTrainerFactory, MemoryFileTrainerEngine),
):
    if MEMORY_FILE not in _factory._registry:
        _factory.register_engine(MEMORY_FILE, _end)

if os.environ[TRAINER] != str(os.getpid()):
    _end_with(int(os.environ[TRAINER]))
