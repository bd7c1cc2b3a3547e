"""What a whole run comes to: evaluations, hours, tokens, disk. Estimates, but for the counts."""

from dataclasses import replace
from typing import NamedTuple

from trainer.plan.job import Job
from trainer.plan.memory import Memory
from trainer.plan.timing import Seconds, sampling_seconds

# Of the sets that trainer/tasks/benchmarks.py knows.
PROBLEMS = {
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 674,
}


class Totals(NamedTuple):
    """Of a run, from its first step to its last."""

    steps: int
    updates: int
    evaluations: int
    """With that before training."""
    evaluation_seconds: float | None
    """Of one; None where a step has no seconds."""
    hours: float | None
    """Of wall time, evaluations included."""
    gpu_hours: float | None
    """Engines' own GPUs included."""
    sampled_tokens: float
    """Of responses, evaluations left out."""
    trained_tokens: float
    """Of responses, each counted once; those of useless groups are sampled and not trained on."""
    checkpoint_bytes: float
    """Of one checkpoint: weights and AdamW's moments."""
    disk_bytes: float
    """Of all that are there at a time: those kept, and one that is being written."""


def totals(job: Job, memory: Memory, seconds: Seconds | None) -> Totals:
    """What the run of `job` comes to; `seconds` are those of a step."""
    config, steps = job.config, job.config.steps
    evaluations = 1 + steps // config.eval.every + (steps % config.eval.every > 0)
    once = hours = None
    if seconds is not None:
        once = evaluation_seconds(job, memory)
        hours = (steps * seconds.step + evaluations * once) / 3600
    weights = float(job.master_bytes * job.architecture.parameters)
    kept = kept_checkpoints(job)
    trained = steps * job.sequences * job.response
    return Totals(
        steps=steps,
        updates=steps * config.optimizer.mini_batches,
        evaluations=evaluations,
        evaluation_seconds=once,
        hours=hours,
        gpu_hours=None if hours is None else hours * job.all_gpus,
        sampled_tokens=trained * job.rounds,
        trained_tokens=trained,
        checkpoint_bytes=3 * weights,
        disk_bytes=3 * weights * (len(kept) + 1) - 2 * weights * (0 in kept),
    )


def evaluation_seconds(job: Job, memory: Memory) -> float:
    """Of one evaluation: each of its draws waits for its longest response. With a limit of its own
    lengths are the same shares of it."""
    lengths = job.lengths
    limit = job.config.eval.max_new_tokens or lengths.limit
    scaled = replace(lengths, mean=lengths.mean / lengths.limit * limit, limit=limit)
    job = replace(job, given_lengths=scaled)
    return sum(
        sum(sampling_seconds(job, memory, prompts, prompts * samples))
        for prompts, samples in evaluation_draws(job)
    )


def evaluation_draws(job: Job) -> list[tuple[int, int]]:
    """Problems and responses to each, of each draw of an evaluation: of the held-out problems and
    of every set of eval.data the sampled and the greedy ones. A set of unknown size counts as many
    problems as are held out."""
    asked = job.config.eval
    names = (name.partition("=")[0] for name in asked.data)
    sizes = [asked.problems, *(PROBLEMS.get(name, asked.problems) for name in names)]
    return [draw for size in sizes for draw in ((size, asked.samples), (size, 1))]


def kept_checkpoints(job: Job) -> set[int]:
    """Steps of the checkpoints that are there once the run has ended: the last, and those of
    keep_every. That before training has no moments."""
    config = job.config
    written = [*range(0, config.steps, config.checkpoint_every), config.steps]
    every = config.keep_every
    kept = {step for step in written if every and step % every == 0}
    return kept.union(written[-config.keep_checkpoints :])
