"""Seconds of a step by a model: the vendor's peaks times assumed efficiencies. Not measurements."""

import math
from typing import NamedTuple

from trainer.plan.flops import Flops
from trainer.plan.job import Job
from trainer.plan.memory import Memory, cache_bytes


class Seconds(NamedTuple):
    """Of one step. Phases follow one another."""

    prefill: float
    decode: float
    score: float
    update: float
    push: float
    """Of weights to the engines."""

    @property
    def step(self) -> float:
        return sum(self)


def step_seconds(job: Job, flops: Flops, memory: Memory) -> Seconds:
    """Seconds of one step of `job`, whose device has rates."""
    rate = job.device.flops * job.assumptions.mfu * job.gpus
    count = job.micro_batches * job.config.optimizer.mini_batches
    gather, reduce = collective_seconds(job)
    return Seconds(
        prefill=flops.prefill / rate,
        decode=_decode(job, flops, memory, rate),
        score=max(flops.score / rate, count * gather),
        update=max(flops.update / rate, count * (2 * gather + reduce)),
        push=gather,
    )


def collective_seconds(job: Job) -> tuple[float, float]:
    """Of gathering all weights in the compute type, and of reducing all gradients in fp32.

    A ring over N GPUs moves (N - 1) / N of the bytes over each link. Between nodes all GPUs of a
    node send at once, and each byte enters a node once.
    """
    if not job.sharded:
        return 0.0, 0.0
    device = job.device
    link = device.link
    if job.nodes > 1:
        link = min(link, device.network * job.gpus_per_node)
    moved = (job.gpus - 1) / job.gpus * job.architecture.parameters
    rate = link * job.assumptions.network_efficiency
    return job.compute_bytes * moved / rate, 4 * moved / rate


def slots(job: Job, memory: Memory) -> int:
    """Sequences that an engine decodes at once: all of its own, or what its cache holds."""
    own = math.ceil(job.sequences * job.tensor_parallel / job.gpus)
    each = (job.assumptions.prompt + job.response) * cache_bytes(job)
    return max(1, min(own, int(memory["sample"]["cache"] / each)))


def _decode(job: Job, flops: Flops, memory: Memory, rate: float) -> float:
    """All rounds: the larger of reading memory and computing.

    A token's step reads the engine's weights once and the keys and values of all its sequences.
    There are as many steps as the sequences take turns, and then as many as the longest one, which
    reaches the limit, has left.
    """
    own = math.ceil(job.sequences * job.tensor_parallel / job.gpus)
    turns = own / slots(job, memory)
    steps = turns * job.response + (job.config.rollout.max_new_tokens - job.response)
    weights = job.compute_bytes * job.architecture.parameters / job.tensor_parallel
    context = job.assumptions.prompt + job.response / 2
    bytes_read = steps * weights + own * job.response * context * cache_bytes(job)
    reading = bytes_read / (job.device.bandwidth * job.assumptions.decode_efficiency)
    return max(job.rounds * reading, flops.decode / rate)
