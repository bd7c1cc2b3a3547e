"""`python -m trainer plan [PRESET] [--options]`: from what is asked to the tables."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from trainer.config import Config
from trainer.launch.command_line import parse
from trainer.plan.architectures import find_architecture
from trainer.plan.devices import find_device
from trainer.plan.job import Assumptions, Job
from trainer.plan.lengths import Lengths
from trainer.plan.plan import plan
from trainer.plan.show import print_json, print_tables


@dataclass(frozen=True)
class Request:
    """Memory, flops and time of a run before it is started, estimated. All options of `train` are
    there too."""

    architecture: str = ""
    """A transformers folder or a known name such as "qwen3-14b"; by default model.path's."""
    gpus: int = 1
    """GPUs that train: torchrun's ranks. Engines share them, unless engine.devices names others."""
    gpu: str = "h100"
    """The GPU's name in any spelling: a100-40gb, a100-80gb, h100, h200, b200, l40s, 4090, mi300x;
    "cpu" is this machine, without rates. Other GPUs need memory, tflops and bandwidth below."""
    gpu_memory: float | None = None
    """Memory of a GPU in 1e9 bytes; by default what nvidia-smi shows."""
    gpu_tflops: float | None = None
    """Dense bf16 peak of a GPU in 1e12 flops per second; by default the data sheet's."""
    gpu_bandwidth: float | None = None
    """Bandwidth of a GPU's memory in 1e12 bytes per second; by default the data sheet's."""
    gpu_network: float | None = None
    """Network between machines in 1e9 bytes per second and GPU; by default the data sheet's."""
    gpus_per_node: int = 8
    """GPUs that train on a machine: torchrun's --nproc-per-node."""
    machine_gpus: int = 8
    """GPUs of a machine, those of engine.devices included."""
    mean_length: float | None = None
    """Mean tokens of a response; by default the share assume.response_share of the limit."""
    lengths: str = ""
    """A run's folder, whose last ten steps give the mean length and the truncated share."""
    assume: Assumptions = field(default_factory=Assumptions)
    json: bool = False
    """Print JSON."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def make_job(request: Request) -> Job:
    """The job that `request` describes.

    Raises ValueError for numbers that cannot be meant, an unknown GPU or architecture, a run
    without lengths, and what `train` refuses.
    """
    names = (request.architecture,) if request.architecture else ()
    return Job(
        config=request.config,
        architecture=find_architecture(*names or (request.config.model.path, request.config.name)),
        device=find_device(request.gpu, _own_numbers(request)),
        gpus=request.gpus,
        gpus_per_node=request.gpus_per_node,
        machine_gpus=request.machine_gpus,
        given_lengths=_lengths(request),
        assumptions=request.assume,
    )


def _own_numbers(request: Request) -> dict[str, float]:
    own = {
        "memory": (request.gpu_memory, 1e9),
        "flops": (request.gpu_tflops, 1e12),
        "bandwidth": (request.gpu_bandwidth, 1e12),
        "network": (request.gpu_network, 1e9),
    }
    return {name: value * unit for name, (value, unit) in own.items() if value is not None}


def _lengths(request: Request) -> Lengths | None:
    limit = request.config.rollout.max_new_tokens
    if request.lengths and request.mean_length is not None:
        raise ValueError("lengths and mean_length exclude each other; got both")
    if request.mean_length is not None:
        return Lengths(request.mean_length, limit)
    return lengths_of_run(Path(request.lengths), limit) if request.lengths else None


def lengths_of_run(folder: Path, limit: int) -> Lengths:
    """Lengths in the last ten steps of the run in `folder`, for responses up to `limit` tokens.

    Raises ValueError where its metrics.jsonl is missing or has none.
    """
    from trainer.log import read_rows  # brings torch, which --help does without

    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"lengths must be a run's folder; {path} is missing")
    rows = [row for row in read_rows(path) if row.get("response/length")][-10:]
    if not rows:
        raise ValueError(f"lengths must be a run with steps; {path} has no response/length yet")
    mean = sum(row["response/length"] for row in rows) / len(rows)
    truncated = sum(row.get("response/truncated") or 0.0 for row in rows) / len(rows)
    return Lengths(mean, limit, min(truncated, mean / limit))


def main(arguments: list[str]) -> int:
    """`python -m trainer plan [PRESET] [--config FILE] [--options]`; returns 0, or 1 for a job that
    does not fit."""
    request = parse(
        arguments, "python -m trainer plan", Request.__doc__ or "", lambda c: Request(config=c)
    )
    found = plan(make_job(request))
    (print_json if request.json else print_tables)(found)
    return 0 if found.possible else 1
