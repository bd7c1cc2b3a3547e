"""The planner: what a run needs before it is started.

    python -m trainer plan --preset qwen3-14b --gpus 128 --gpu h200

gives the memory of a GPU by part and phase, the flops of a step by part, the head's share of them
and the time of a step. Memory and flops follow from shapes; seconds from the vendor's peaks and the
assumptions that are printed beside them. It needs no GPU and no network.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from trainer.config import Config
from trainer.plan.architectures import find_architecture
from trainer.plan.devices import GPUS, Device, cpu
from trainer.plan.flops import Flops, step_flops, unit
from trainer.plan.job import Assumptions, Job
from trainer.plan.memory import Memory, engine_room, peak, step_memory
from trainer.plan.timing import Seconds, step_seconds
from trainer.presets import PRESETS


@dataclass(frozen=True)
class Request:
    """Memory, flops and time of a run before it is started, estimated. All options of `train` are
    there too."""

    preset: str = "tiny"
    """The run to plan; `train --help` lists the presets."""
    architecture: str = ""
    """A transformers folder or a known name such as "qwen3-14b"; else that of model.path."""
    gpus: int = 1
    """How many train: torchrun's ranks. Engines share them, unless engine.devices names others."""
    gpu: Literal["a100", "h100", "h200", "b200", "cpu"] = "h100"
    """Which; "cpu" is this machine, without rates."""
    memory_gb: float = 0.0
    """Of a GPU, in 1e9 bytes; 0 leaves the data sheet's."""
    tflops: float = 0.0
    """Dense peak of a GPU; 0 leaves the data sheet's."""
    bandwidth_tb: float = 0.0
    """Of a GPU's memory, in 1e12 bytes a second; 0 leaves the data sheet's."""
    network_gb: float = 0.0
    """Between nodes, in 1e9 bytes a second and GPU; 0 leaves the data sheet's."""
    gpus_per_node: int = 8
    """How many share the fast links."""
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
    def fits(self) -> bool:
        return self.peak[1] <= self.job.device.memory and self.engine_starts

    @property
    def engine_starts(self) -> bool:
        """Whether vLLM's share of a GPU holds its weights and one longest sequence."""
        return not (self.job.vllm and self.job.device.is_gpu) or engine_room(self.job) >= 0

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
    found = Plan(job, step_memory(job), step_flops(job), None)
    if not found.fits or not job.device.flops:
        return found
    return replace(found, seconds=step_seconds(job, found.flops, found.memory))


def make_job(request: Request) -> Job:
    """The job that `request` describes.

    Raises ValueError for numbers that cannot be meant and for an unknown architecture.
    """
    device = GPUS[request.gpu] if request.gpu != "cpu" else cpu()
    names = (request.architecture,) if request.architecture else ()
    return Job(
        config=request.config,
        architecture=find_architecture(*names or (request.config.model.path, request.preset)),
        device=_with_own_numbers(device, request),
        gpus=request.gpus,
        gpus_per_node=request.gpus_per_node,
        assumptions=request.assume,
    )


def _with_own_numbers(device: Device, request: Request) -> Device:
    own = {
        "memory": request.memory_gb * 1e9,
        "flops": request.tflops * 1e12,
        "bandwidth": request.bandwidth_tb * 1e12,
        "network": request.network_gb * 1e9,
    }
    given: dict[str, Any] = {name: value for name, value in own.items() if value}
    if any(value < 0 for value in given.values()):
        raise ValueError(f"a GPU's numbers must be positive; got {given}")
    if given:
        given["source"] = f"{device.source}; {', '.join(given)} as given"
    changed = replace(device, **given)
    if bool(changed.flops) != bool(changed.bandwidth):
        raise ValueError("a device without rates needs both tflops and bandwidth_tb, or none")
    return changed


def main(arguments: list[str]) -> int:
    """`python -m trainer plan`; returns 0, or 1 for a job that does not fit."""
    from trainer.plan.show import print_json, print_tables

    name = _preset(arguments)
    default = Request(preset=name, config=PRESETS[name]())
    request = tyro.cli(Request, default=default, args=arguments, prog="python -m trainer plan")
    found = plan(make_job(request))
    (print_json if request.json else print_tables)(found)
    return 0 if found.fits else 1


def _preset(arguments: list[str]) -> str:
    """The preset that `arguments` name: its settings are the defaults of all other options."""
    name = "tiny"
    for i, argument in enumerate(arguments):
        if argument == "--preset":
            name = arguments[i + 1] if i + 1 < len(arguments) else ""
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return name
