"""The planner: what a run needs before it is started.

    python -m trainer plan qwen3-14b --gpus 128 --gpu h200

gives the memory of a GPU by part and phase, the flops of a step by part, the head's share of them,
the time of a step, and what the whole run comes to. Memory and flops follow from shapes; seconds
from the vendor's peaks and the assumptions that are printed beside them. It needs no GPU and no
network, and refuses what `train` refuses.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from trainer.config import Config
from trainer.plan.architectures import find_architecture
from trainer.plan.devices import find_device
from trainer.plan.flops import Flops, step_flops, unit
from trainer.plan.job import Assumptions, Job
from trainer.plan.lengths import Lengths
from trainer.plan.memory import Memory, engine_room, peak, step_memory
from trainer.plan.remedy import find_remedy
from trainer.plan.timing import Seconds, step_seconds
from trainer.plan.totals import Totals, totals


@dataclass(frozen=True)
class Request:
    """Memory, flops and time of a run before it is started, estimated. All options of `train` are
    there too."""

    architecture: str = ""
    """A transformers folder or a known name such as "qwen3-14b"; else that of model.path."""
    gpus: int = 1
    """How many train: torchrun's ranks. Engines share them, unless engine.devices names others."""
    gpu: str = "h100"
    """Which, in any spelling: a100-40gb, a100-80gb, h100, h200, b200, l40s, 4090, mi300x; "cpu" is
    this machine, without rates. Any other needs the first three of the numbers below."""
    gpu_memory: float | None = None
    """Of a GPU, in 1e9 bytes; else what nvidia-smi shows."""
    gpu_tflops: float | None = None
    """Dense bf16 peak of a GPU; else the data sheet's."""
    gpu_bandwidth: float | None = None
    """Of a GPU's memory, in 1e12 bytes a second; else the data sheet's."""
    gpu_network: float | None = None
    """Between machines, in 1e9 bytes a second and GPU; else the data sheet's."""
    gpus_per_node: int = 8
    """GPUs that train on a machine: torchrun's --nproc-per-node."""
    machine_gpus: int = 8
    """All GPUs of a machine, those of engine.devices included."""
    mean_length: float | None = None
    """Mean tokens of a response; else of the limit the share assume.response_share."""
    lengths: str = ""
    """A run's folder, whose last ten steps say the mean length and the share that is truncated."""
    assume: Assumptions = field(default_factory=Assumptions)
    json: bool = False
    """Print JSON."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Plan:
    """What a job needs; `seconds` is None where it does not fit and for a device without rates."""

    job: Job
    memory: Memory
    flops: Flops
    seconds: Seconds | None

    @property
    def peak(self) -> tuple[str, float]:
        """The phase with the most bytes, and how many."""
        return peak(self.memory)

    @property
    def possible(self) -> bool:
        """Whether the sums are no more than a GPU has, if only just."""
        return self.peak[1] <= self.job.device.memory and self.engine_starts

    @property
    def fits(self) -> bool:
        """Whether the margin that is assumed is left as well."""
        room = self.job.device.memory * (1 - self.job.assumptions.margin)
        return self.possible and self.peak[1] <= room

    @property
    def engine_starts(self) -> bool:
        """Whether vLLM's share of a GPU holds its weights and one longest sequence."""
        return not (self.job.vllm and self.job.device.is_gpu) or engine_room(self.job) >= 0

    @property
    def remedy(self) -> str | None:
        """The options that make it fit, by trying; None where nothing that is tried does."""
        return find_remedy(self.job, lambda job: _sums(job).fits)

    @property
    def totals(self) -> Totals:
        """Of the whole run."""
        return totals(self.job, self.memory, self.seconds)

    @property
    def largest_part(self) -> tuple[str, float]:
        """Of the peak's phase."""
        parts = self.memory[self.peak[0]]
        name = max(parts, key=lambda part: parts[part])
        return name, parts[name]

    def head_share(self, units: float) -> float:
        """The head's share of the flops of scoring and updating, with so many units in the
        update."""
        head = self.flops.score_head + units * unit(self.job)
        rest = self.flops.score + self.flops.update - self.flops.score_head - self.flops.update_head
        return head / (head + rest)


def plan(job: Job) -> Plan:
    """What `job` needs."""
    found = _sums(job)
    if not found.possible or not job.device.flops:
        return found
    return replace(found, seconds=step_seconds(job, found.flops, found.memory))


def _sums(job: Job) -> Plan:
    return Plan(job, step_memory(job), step_flops(job), None)


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
    """Of the last ten steps of the run in `folder`, for responses of up to `limit` tokens.

    Raises ValueError where its metrics.jsonl is missing or has none.
    """
    from trainer.log import read_rows

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
    from trainer.launch.command_line import parse
    from trainer.plan.show import print_json, print_tables

    request = parse(
        arguments, "python -m trainer plan", Request.__doc__ or "", lambda c: Request(config=c)
    )
    found = plan(make_job(request))
    (print_json if request.json else print_tables)(found)
    return 0 if found.possible else 1
