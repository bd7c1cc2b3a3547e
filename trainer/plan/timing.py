"""Seconds of a step by a model, not measured: the vendor's peaks times assumed efficiencies."""

from typing import NamedTuple

from trainer.plan.flops import Flops, sampling_flops
from trainer.plan.job import Job
from trainer.plan.lengths import steps_of
from trainer.plan.memory import Memory, cache_bytes


class Seconds(NamedTuple):
    """Seconds of one step, whose phases follow one another."""

    prefill: float
    decode: float
    score: float
    update: float
    push: float
    """Push of the weights to the engines."""

    @property
    def step(self) -> float:
        return sum(self)


def step_seconds(job: Job, flops: Flops, memory: Memory) -> Seconds:
    """Seconds of one step of `job`, whose device has rates."""
    rate = job.device.flops * job.assumptions.mfu * job.gpus
    count = job.micro_batches * job.config.optimizer.mini_batches
    gather, reduce = collective_seconds(job)
    prefill, decode = sampling_seconds(job, memory, job.config.rollout.prompts, job.sequences)
    return Seconds(
        prefill=job.rounds * prefill,
        decode=job.rounds * decode,
        score=max(flops.score / rate, job.scoring_passes * count * gather),
        update=max(flops.update / rate, count * (2 * gather + reduce)),
        push=gather,
    )


def collective_seconds(job: Job) -> tuple[float, float]:
    """Seconds to gather all weights in the compute type, and to reduce all gradients in fp32.

    A ring over N GPUs moves (N - 1) / N of the bytes over each link. Between nodes all GPUs of a
    node send at once, and each byte enters a node once.
    """
    if not job.sharded or job.gpus == 1:
        return 0.0, 0.0
    device = job.device
    link = device.link
    if job.nodes > 1:
        link = min(link, device.network * job.gpus_per_node)
    moved = (job.gpus - 1) / job.gpus * job.architecture.parameters
    rate = link * job.assumptions.network_efficiency
    return job.compute_bytes * moved / rate, 4 * moved / rate


def slots(job: Job, memory: Memory, sequences: int | None = None) -> int:
    """Sequences that an engine decodes at once: all of its `sequences`, by default a round's.

    They are fewer where it takes fewer in a batch or its cache holds fewer. A place in the cache
    holds a prompt and what there is of its response at the time.
    """
    own = job.sequences_per_engine if sequences is None else sequences
    at_once = min(own, job.config.rollout.batch_size)
    if not job.vllm:
        return at_once
    each = (job.assumptions.prompt + job.lengths.held) * cache_bytes(job)
    cache = memory["engine" if job.apart else "sample"]["cache"]
    return max(1, min(at_once, int(cache / each)))


def sampling_seconds(job: Job, memory: Memory, prompts: int, sequences: int) -> tuple[float, float]:
    """Reading `prompts` and decoding `sequences` responses on all engines.

    Decoding takes the larger of reading memory and computing. A token's step reads the engine's
    weights once and the keys and values of all sequences under way. vLLM fills a place that
    becomes free; the trainer's own engine takes batch after batch, each to its longest. All wait
    for the engine that has the longest response of all.
    """
    own = -(-sequences // job.gpus)
    lengths = [*job.lengths.of(own)[:-1], job.lengths.of(sequences)[-1]]
    at_once = slots(job, memory, own)
    if job.vllm:
        steps = steps_of(lengths, at_once)
    else:
        batches = -(-own // at_once)
        steps = sum(job.lengths.of(at_once)[-1:] * (batches - 1)) + lengths[-1]
    weights = job.engine_bytes * job.architecture.parameters / job.tensor_parallel
    context = job.assumptions.prompt * job.response + job.lengths.second_moment / 2
    bytes_read = steps * weights + own * context * cache_bytes(job)
    reading = bytes_read / (job.device.bandwidth * job.assumptions.decode_efficiency)
    rate = job.device.flops * job.assumptions.mfu * job.gpus
    rate *= job.tensor_parallel if job.apart else 1  # GPUs that sample, for each that trains
    prefill, decode = sampling_flops(job, prompts, sequences)
    return prefill / rate, max(reading, decode / rate)
