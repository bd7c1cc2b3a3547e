"""Changes that make a run fit, tried in order; the first that works is told."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from trainer.plan.job import Job

Change = Callable[[Job], Iterator[Job]]
"""Turns a job into others that each change the same setting; refused ones are left out."""


def find_remedy(job: Job, fits: Callable[[Job], bool]) -> str | None:
    """The options of the first change of `job` that makes it fit, of one kind or of two; None where
    none does. What costs least comes first, GPUs last."""
    for count in (1, 2):
        for kinds in itertools.combinations(_CHANGES, count):
            for changed in _all(job, kinds):
                if fits(changed):
                    return _options(job, changed)
    return None


def _all(job: Job, kinds: tuple[Change, ...]) -> Iterator[Job]:
    if not kinds:
        yield job
        return
    for changed in kinds[0](job):
        yield from _all(changed, kinds[1:])


def _options(job: Job, changed: Job) -> str:
    """The options that turn the command line of `job` into that of `changed`."""
    found = []
    for name in ("gpus", "gpus_per_node"):
        if getattr(changed, name) != getattr(job, name):
            found.append(f"--{name.replace('_', '-')} {getattr(changed, name)}")
    for part in ("optimizer", "model", "rollout", "engine"):
        before, after = asdict(getattr(job.config, part)), asdict(getattr(changed.config, part))
        for name, value in after.items():
            if value != before[name]:
                option = f"--{part}.{name.replace('_', '-')}"
                values = value if isinstance(value, tuple) else (value,)
                found.append(" ".join([option, *(str(v) for v in values if v is not True)]))
    return " ".join(found)


def _smaller_micro_batches(job: Job) -> Iterator[Job]:
    tokens = job.config.optimizer.tokens_per_micro_batch
    while tokens > job.longest:
        tokens = max(tokens // 2, job.longest)
        yield from _changed(job, "optimizer", "tokens_per_micro_batch", tokens)


def _recomputed_activations(job: Job) -> Iterator[Job]:
    if not job.config.model.gradient_checkpointing:
        yield from _changed(job, "model", "gradient_checkpointing", True)


def _bfloat16(job: Job) -> Iterator[Job]:
    if job.compute_bytes == 4 and job.device.is_gpu:
        yield from _changed(job, "model", "compute_dtype", "bfloat16")


def _less_for_the_engine(job: Job) -> Iterator[Job]:
    """Smaller shares of a GPU for vLLM; none if the cache has a size of its own."""
    if job.vllm and job.device.is_gpu:
        for tenths in range(9, 1, -1):
            if tenths / 10 < job.config.engine.memory_utilization:
                yield from _changed(job, "engine", "memory_utilization", tenths / 10)


def _more_for_the_engine(job: Job) -> Iterator[Job]:
    if job.vllm and job.device.is_gpu:
        for tenths in range(3, 10):
            if tenths / 10 > job.config.engine.memory_utilization:
                yield from _changed(job, "engine", "memory_utilization", tenths / 10)


def _fewer_sampled_at_once(job: Job) -> Iterator[Job]:
    size = job.config.rollout.batch_size
    while not job.vllm and size > 1:
        size //= 2
        yield from _changed(job, "rollout", "batch_size", size)


def _engines_beside(job: Job) -> Iterator[Job]:
    """Half of a machine's GPUs train, and the others sample, one or more to an engine."""
    if not (job.vllm and job.device.is_gpu) or job.apart or job.gpus < job.gpus_per_node:
        return
    for parallel in (1, 2, 4):
        ranks = job.machine_gpus // (1 + parallel)
        if ranks < 1:
            return
        devices = tuple(range(ranks, ranks * (1 + parallel)))
        engine = replace(
            job.config.engine, placement="beside", devices=devices, tensor_parallel=parallel
        )
        config = replace(job.config, engine=engine)
        yield from _made(job, config=config, gpus=ranks * job.nodes, gpus_per_node=ranks)


def _more_gpus(job: Job) -> Iterator[Job]:
    for factor in (2, 4, 8, 16) if job.device.is_gpu else ():
        yield from _made(job, gpus=factor * job.gpus)


_CHANGES: tuple[Change, ...] = (
    _smaller_micro_batches,
    _recomputed_activations,
    _bfloat16,
    _fewer_sampled_at_once,
    _less_for_the_engine,
    _more_for_the_engine,
    _engines_beside,
    _more_gpus,
)


def _changed(job: Job, part: str, name: str, value: Any) -> Iterator[Job]:
    section = replace(getattr(job.config, part), **{name: value})
    yield from _made(job, config=replace(job.config, **{part: section}))


def _made(job: Job, **changes: Any) -> Iterator[Job]:
    """The changed job, or nothing where it is refused."""
    try:
        changed = replace(job, **changes)
    except ValueError:
        return
    yield changed
