"""What a job needs: memory, flops and seconds, and whether it fits."""

from dataclasses import dataclass, replace

from trainer.plan.flops import Flops, step_flops, unit
from trainer.plan.job import Job
from trainer.plan.memory import Memory, engine_room, peak, step_memory
from trainer.plan.remedy import find_remedy
from trainer.plan.timing import Seconds, step_seconds
from trainer.plan.totals import Totals, totals


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
        """What the whole run comes to."""
        return totals(self.job, self.memory, self.seconds)

    @property
    def largest_part(self) -> tuple[str, float]:
        """The largest part of the peak's phase, and its bytes."""
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
