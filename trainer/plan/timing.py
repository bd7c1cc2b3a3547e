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
        prefill=flops.prefill / (rate * _engine_gpus(job)),
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
    """Sequences that an engine decodes at once: all of its own, or as many as it takes in a batch
    or its cache holds."""
    at_once = min(job.sequences_per_engine, job.config.rollout.batch_size)
    if not job.vllm:
        return at_once
    each = (job.assumptions.prompt + job.response) * cache_bytes(job)
    cache = memory["engine" if job.apart else "sample"]["cache"]
    return max(1, min(at_once, int(cache / each)))


def _decode(job: Job, flops: Flops, memory: Memory, rate: float) -> float:
    """All rounds: the larger of reading memory and computing.

    A token's step reads the engine's weights once and the keys and values of all its sequences.
    vLLM fills a place that becomes free: there are as many steps as the sequences take turns, and
    then as many as the longest one, which reaches the limit, has left. The trainer's own engine
    takes batch after batch, each to the limit.
    """
    own, limit = job.sequences_per_engine, job.config.rollout.max_new_tokens
    turns = own / slots(job, memory)
    steps = turns * job.response + limit - job.response if job.vllm else math.ceil(turns) * limit
    weights = job.engine_bytes * job.architecture.parameters / job.tensor_parallel
    context = job.assumptions.prompt + job.response / 2
    bytes_read = steps * weights + own * job.response * context * cache_bytes(job)
    reading = bytes_read / (job.device.bandwidth * job.assumptions.decode_efficiency)
    return max(job.rounds * reading, flops.decode / (rate * _engine_gpus(job)))


def _engine_gpus(job: Job) -> int:
    """GPUs that sample, for each that trains."""
    return job.tensor_parallel if job.apart else 1
