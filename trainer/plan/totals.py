"""Totals of a run: evaluations, hours, tokens, disk. All but the counts are estimates."""

from dataclasses import replace
from typing import NamedTuple

from trainer.plan.job import Job
from trainer.plan.memory import Memory
from trainer.plan.timing import Seconds, sampling_seconds

# The sizes of the sets that trainer/tasks/benchmarks.py knows.
PROBLEMS = {
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 674,
}


class Totals(NamedTuple):
    """The totals of a run, from its first step to its last."""

    steps: int
    updates: int
    evaluations: int
    """How many there are, the one before training included."""
    evaluation_seconds: float | None
    """Seconds of one evaluation; None where a step has no seconds."""
    hours: float | None
    """Hours of wall time, evaluations included."""
    gpu_hours: float | None
    """GPU-hours, engines' own GPUs included."""
    sampled_tokens: float
    """Tokens of responses, without evaluations."""
    trained_tokens: float
    """Tokens of responses that are trained on, each counted once; useless groups are left out."""
    checkpoint_bytes: float
    """Bytes of one checkpoint: weights and AdamW's moments."""
    disk_bytes: float
    """Bytes of the checkpoints that are kept and of one that is being written."""


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
    """Seconds of one evaluation, each of whose draws waits for its longest response. If it has a
    length limit of its own, lengths scale with the limit."""
    lengths = job.lengths
    limit = job.config.eval.max_new_tokens or lengths.limit
    scaled = replace(lengths, mean=lengths.mean / lengths.limit * limit, limit=limit)
    job = replace(job, given_lengths=scaled)
    return sum(
        sum(sampling_seconds(job, memory, prompts, prompts * samples))
        for prompts, samples in evaluation_draws(job)
    )


def evaluation_draws(job: Job) -> list[tuple[int, int]]:
    """(problems, responses per problem) of each draw of an evaluation. The held-out problems and
    every set of eval.data have a sampled and a greedy draw. A set of unknown size counts as many
    problems as are held out."""
    asked = job.config.eval
    names = (name.partition("=")[0] for name in asked.data)
    sizes = [asked.problems, *(PROBLEMS.get(name, asked.problems) for name in names)]
    return [draw for size in sizes for draw in ((size, asked.samples), (size, 1))]


def kept_checkpoints(job: Job) -> set[int]:
    """Steps of the checkpoints that remain after the run: the last ones, and those of keep_every.
    The one before training, at step 0, has no moments."""
    config = job.config
    written = [*range(0, config.steps, config.checkpoint_every), config.steps]
    every = config.keep_every
    kept = {step for step in written if every and step % every == 0}
    return kept.union(written[-config.keep_checkpoints :])
