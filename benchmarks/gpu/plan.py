"""What a run does, in order: shards, each the work of one process, with its predicted seconds.

The seconds are predictions for an H200 with 16 cores. They were made before any run.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.rows import Row, Rows

if TYPE_CHECKING:
    from benchmarks.gpu.setting import Sizes

TABLE, PROFILE = "table", "profile"
# Stages of a run, and what one of them costs; PROFILE runs only where it is asked for.
SECONDS = {
    "floors": 12,
    "correctness": 60,
    "steps": 50,
    "shapes": 110,
    "threshold": 30,
    "peers": 90,
    "sweep": 80,
    TABLE: 8,
    PROFILE: 300,
}
STAGES = tuple(SECONDS)
# Their shards run beside each other: compilation takes nearly all of their time.
ALONGSIDE = ("correctness",)
# More would wait for the GPU.
MOST_PROCESSES = 14
# Processes of one pair of tiles: each compiles about ten kernels.
PARTS = 3
# Bytes of the GPU that a shard of ordinary cases may take: the truth in fp64 of the largest one.
CASE_BYTES = 8e9
OFFSET_BYTES = 36e9
# Where other kernels are timed, this one of ours is among them.
OURS = "triton-0.2"
PEERS = {
    "others": ("trl", "torch-lce", "cce-filtered", "cce-exact", "liger-grpo", "liger-grpo-tf32"),
    "flsce": ("flsce", "flsce-composed", "flsce-known", "flsce-forward"),
    "verl": ("verl", "verl-forward"),
}


@dataclass(frozen=True)
class Shard:
    stage: str
    name: str
    """Unique in a plan."""
    work: str
    """module:function, called with the rows and the job."""
    seconds: float
    """Predicted, of one process."""
    arguments: Row = field(default_factory=dict)
    bytes: float = 0
    """What it takes of the GPU's memory at most; 0 for all of it."""


def describe(rows: Rows, job: Row) -> None:
    """Prints what a conductor must know of this machine: about, processes, memory and shards."""
    import torch

    from benchmarks.gpu import environment
    from benchmarks.gpu.setting import here, sizes

    device, quick = here(), job["quick"]
    if device.type != "cuda" and not quick and not job["plan"]:
        raise SystemExit("no GPU is here; --quick runs tiny shapes on the CPU")
    memory = 0
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    predicted = device.type != "cuda" and not quick
    # The plan of the GPU that the predictions are for.
    architecture = "sm_90" if predicted else environment.architecture(device)
    cores = 16 if predicted else len(os.sched_getaffinity(0))
    processes = min(MOST_PROCESSES, max(cores - 2, 2))
    found = {
        "about": {} if predicted else environment.about(device, quick, job["commit"]),
        "memory": memory,
        "processes": processes,
        "shards": [asdict(x) for x in shards(architecture, sizes(quick), quick, processes)],
    }
    print(json.dumps(found))


def shards(architecture: str, sizes: "Sizes", quick: bool, processes: int) -> list[Shard]:
    """The whole plan, PROFILE included."""
    found = [_shard("floors", "floors", "floors:run")]
    found += _correctness(architecture, sizes, quick, processes)
    found.append(_step("steps", sizes.base, sizes.vocabulary, "base", SECONDS["steps"]))
    whole = sum(tokens * hidden for tokens, hidden in sizes.more)
    for tokens, hidden in sizes.more:
        # Half of the time is the same for all.
        seconds = SECONDS["shapes"] * (0.25 + tokens * hidden / whole / 2)
        found.append(_step("shapes", (tokens, hidden), sizes.vocabulary, "base", seconds))
    found.append(_shard("threshold", "threshold", "selection:run"))
    for group in PEERS:
        vocabulary = sizes.divided_vocabulary if group == "verl" else sizes.vocabulary
        seconds = SECONDS["peers"] / len(PEERS)
        found.append(_step("peers", sizes.base, vocabulary, group, seconds))
    for hidden in sizes.hidden:
        seconds = SECONDS["sweep"] / len(sizes.hidden)
        found.append(_shard("sweep", f"sweep D={hidden}", "sweep:run", seconds, hidden=hidden))
    found.append(_shard(PROFILE, PROFILE, "tools:run"))
    return [*found, _shard(TABLE, TABLE, "table:run")]


def _correctness(architecture: str, sizes: "Sizes", quick: bool, processes: int) -> list[Shard]:
    """bf16 by the table's choice first, and what may hang last."""
    from benchmarks.gpu import correctness

    groups = list(correctness.groups(architecture, quick))
    parts = {x.name: 1 if quick or x.impl or x.large else PARTS for x in groups}
    first_uses = (*sizes.hidden, 0)
    each = SECONDS["correctness"] * processes / (sum(parts.values()) + len(first_uses))
    found = []
    for hidden in first_uses:
        name = f"first use, D={hidden}" if hidden else "first use, selection and loss"
        work, asked = "benchmarks.gpu.first_use:run", {"hidden": hidden}
        found.append(Shard("correctness", name, work, each, asked, CASE_BYTES))
    for group in groups:
        for part in range(parts[group.name]):
            name = f"correctness {group.name}, {part + 1} of {parts[group.name]}"
            size = OFFSET_BYTES if group.large else CASE_BYTES
            arguments: Row = {"group": group.name, "part": part, "parts": parts[group.name]}
            work = "benchmarks.gpu.correctness:run"
            found.append(Shard("correctness", name, work, each, arguments, size))
    return found


def _step(stage: str, shape: tuple[int, int], vocabulary: int, group: str, seconds: float) -> Shard:
    tokens, hidden = shape
    arguments = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "group": group}
    name = f"{group} T={tokens} D={hidden} V={vocabulary}"
    return _shard(stage, name, "steps:run", seconds, **arguments)


def _shard(
    stage: str, name: str, work: str, seconds: float | None = None, **arguments: Any
) -> Shard:
    work = f"benchmarks.gpu.{work}"
    return Shard(stage, name, work, SECONDS[stage] if seconds is None else seconds, arguments)
