"""A plan as tables on a terminal, or as JSON."""

import dataclasses
import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.launch.needs import needs
from trainer.plan.flops import Flops, head_units, unit
from trainer.plan.job import Assumptions, Job
from trainer.plan.memory import eager_logits, engine_room
from trainer.plan.plan import Plan
from trainer.plan.timing import Seconds, collective_seconds, slots
from trainer.plan.totals import kept_checkpoints

_MARGIN = "for fragmentation and what is counted too low"
_FLOPS_LABELS = {
    "prefill": "rollout: prefill",
    "decode": "rollout: decode",
    "score_backbone": "score: layers",
    "score_head": "score: head",
    "forward": "update: forward of the layers",
    "recompute": "update: the same, recomputed",
    "backward": "update: backward of the layers",
    "update_head": "update: head",
}


def print_tables(plan: Plan) -> None:
    """The plan, and all that it assumes."""
    console = Console()
    for line in _summary(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in (_memory(plan), _flops(plan), _head(plan)):
        console.print(table)
    if plan.seconds is not None:
        console.print(_time(plan.seconds))
    console.print(_totals(plan))
    console.print("Assumed, not measured:", highlight=False)
    for line in assumptions(plan):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def print_json(plan: Plan) -> None:
    """The same as one JSON object, in bytes, flops and seconds."""
    print(json.dumps(as_dict(plan), indent=2))


def as_dict(plan: Plan) -> dict[str, Any]:
    job, (phase, most) = plan.job, plan.peak
    return {
        "preset": job.config.name,
        "architecture": dataclasses.asdict(job.architecture)
        | {"parameters": job.architecture.parameters},
        "device": dataclasses.asdict(job.device),
        "gpus": job.gpus,
        "engine_starts": plan.engine_starts,
        "memory": plan.memory,
        "peak": {"phase": phase, "bytes": most, "largest_part": plan.largest_part[0]},
        "fits": plan.fits,
        "possible": plan.possible,
        "verdict": verdict(plan),
        "remedy": None if plan.fits else plan.remedy,
        "needs": [dataclasses.asdict(need) for need in needs(job.config)],
        "eager_logits_bytes": eager_logits(job),
        "flops": plan.flops._asdict(),
        "head": {
            name: {"units": units, "share": plan.head_share(units)}
            for name, units in head_variants(plan).items()
        },
        "seconds": plan.seconds and plan.seconds._asdict() | {"step": plan.seconds.step},
        "totals": plan.totals._asdict(),
        "lengths": dataclasses.asdict(job.lengths),
        "assumptions": dataclasses.asdict(job.assumptions),
    }


def head_variants(plan: Plan) -> dict[str, float]:
    """Units of the head in an update, by how it is computed."""
    fraction = plan.job.config.algorithm.share
    return {
        "eager logits [T, V]": 3.0,
        "compaction: 1 + 3f": 1 + 3 * fraction,
        "threshold known, logits stored: 1 + 2f": 1 + 2 * fraction,
        "mask known, recomputed: 4f": 4 * fraction,
        "mask known, logits stored: 3f": 3 * fraction,
        "this run": head_units(plan.job),
    }


def assumptions(plan: Plan) -> list[str]:
    """Every number that the plan takes for granted, a line each."""
    job, lines = plan.job, []
    for field in dataclasses.fields(Assumptions):
        lines.append(f"{field.name} = {getattr(job.assumptions, field.name):g}")
    device = job.device
    lines.append(
        f"a GPU: {device.memory / 1e9:g} GB, {device.flops / 1e12:g} Tflop/s, "
        f"{device.bandwidth / 1e12:g} TB/s; links {device.link / 1e9:g}, network "
        f"{device.network / 1e9:g} GB/s ({device.source})"
    )
    if plan.seconds is not None:
        gather, reduce = collective_seconds(job)
        lines += [
            f"an engine decodes {slots(job, plan.memory):,} sequences at once",
            f"a micro-batch gathers the weights in {gather:.2g} s, when scored and twice when "
            f"updated, and reduces gradients in {reduce:.2g} s",
        ]
    lines += [
        f"responses have {job.response:,.0f} tokens in the mean ({_where(job)}), "
        f"{job.lengths.truncated:.1%} of them the limit, and the others are spread as an "
        "exponential that ends at the limit",
        "GPUs are evenly loaded; no padding; collectives hide behind computation or the reverse",
        "verification, the optimizer, checkpoints and everything that is no matrix product take no "
        "time",
    ]
    return lines


def _where(job: Job) -> str:
    """The source of the mean length."""
    given = job.given_lengths is not None
    return "as given" if given else "by response_share; --mean-length or --lengths RUN say others"


def _summary(plan: Plan) -> list[str]:
    job = plan.job
    nodes = f", {job.nodes} nodes" if job.nodes > 1 else ""
    engines = f" and {job.all_gpus - job.gpus} for engines" if job.apart else ""
    lines = [
        f"{job.config.name}: {job.architecture.parameters / 1e9:.2f} G parameters on {job.gpus} "
        f"GPU{'s' * (job.gpus > 1)}{engines}{nodes}; {job.sequences:,} sequences per step, "
        f"{job.sequences_per_update:,} per update, {job.micro_batches} micro-batches of at most "
        f"{job.micro_batch:,} tokens per update and GPU",
        verdict(plan),
    ]
    if not plan.engine_starts:
        lines.append(
            f"vLLM does not start: engine.memory_utilization leaves {_gb(-engine_room(job))} GB "
            "too little for its weights and one sequence of engine.max_model_len"
        )
    if not plan.fits:
        remedy = plan.remedy
        lines.append(f"it fits with {remedy}" if remedy else "nothing that was tried makes it fit")
    if job.sequences_per_update < job.gpus:
        lines.append(
            f"{job.gpus - job.sequences_per_update} of {job.gpus} GPUs have nothing to do in an "
            f"update of {job.sequences_per_update} sequences"
        )
    positions = job.architecture.positions
    if positions is not None and job.longest > positions:
        room = positions - job.config.rollout.max_new_tokens
        lines.append(f"longer prompts than {room} tokens are refused: it has {positions} positions")
    return [*lines, *(f"needs {need}" for need in needs(job.config))]


def verdict(plan: Plan) -> str:
    """Whether the job fits, and by how much."""
    (phase, most), room = plan.peak, plan.job.device.memory
    margin, free = plan.job.assumptions.margin, math.floor(1000 * (1 - most / room)) / 1000
    size = f"{_gb(most)} of {_gb(room)} GB per GPU at the peak ({phase})"
    if most > room:
        name, largest = plan.largest_part
        return f"does not fit: {size}; the largest part: {name}, {_gb(largest)} GB"
    asked = f"{margin:.0%} {_MARGIN}"
    if not plan.fits and plan.engine_starts:
        return f"tight: {size}, {free:.1%} free; less than the {asked}"
    return f"{'fits' if plan.fits else 'would fit'}: {size}, {free:.1%} free; wanted: {asked}"


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory of a GPU, GB (1e9 bytes)", title_justify="left")
    phases = list(plan.memory)
    table.add_column("", no_wrap=True)
    for phase in phases:
        table.add_column(phase, justify="right")
    parts = dict.fromkeys(part for phase in phases for part in plan.memory[phase])
    for part in parts:
        cells = (plan.memory[phase].get(part) for phase in phases)
        table.add_row(part, *("" if cell is None else _gb(cell) for cell in cells))
    table.add_section()
    table.add_row("sum", *(_gb(sum(plan.memory[phase].values())) for phase in phases))
    table.add_row("eager: [T, V] logits", "", _gb(eager_logits(plan.job)))
    return table


def _flops(plan: Plan) -> Table:
    table = Table(title="Flops of a step, all GPUs", title_justify="left")
    for heading in ("", "flops", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    total = sum(plan.flops)
    for name in Flops._fields:
        value = getattr(plan.flops, name)
        table.add_row(_FLOPS_LABELS[name], f"{value:.3g}", f"{value / total:.1%}")
    return table


def _head(plan: Plan) -> Table:
    table = Table(title=f"The head, f = {plan.job.config.algorithm.share:g}", title_justify="left")
    for heading in ("", "units", "flops", "of the trainer's"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, units in head_variants(plan).items():
        flops = f"{units * unit(plan.job):.3g}"
        table.add_row(name, f"{units:.2f}", flops, f"{plan.head_share(units):.1%}")
    return table


def _time(seconds: Seconds) -> Table:
    table = Table(title="Seconds of a step, estimated", title_justify="left")
    for heading in ("", "s", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in seconds._asdict().items():
        table.add_row(name, f"{value:,.1f}", f"{value / seconds.step:.1%}")
    table.add_section()
    table.add_row("step", f"{seconds.step:,.1f}", "")
    return table


def _totals(plan: Plan) -> Table:
    """Counts, and times if the seconds of a step are known."""
    job, found = plan.job, plan.totals
    kept = len(kept_checkpoints(job))
    title = "The whole run; times are estimated"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right")
    rows = [
        ("steps", f"{found.steps:,}"),
        ("updates", f"{found.updates:,}"),
        ("evaluations, the first before training", f"{found.evaluations:,}"),
        ("tokens of responses, sampled", f"{found.sampled_tokens:.3g}"),
        ("tokens of responses, trained on", f"{found.trained_tokens:.3g}"),
        ("GB of a checkpoint", _gb(found.checkpoint_bytes)),
        (f"GB on disk, {kept} kept and one in writing", _gb(found.disk_bytes)),
    ]
    if found.hours is not None and found.evaluation_seconds is not None:
        rows += [
            ("seconds of an evaluation", f"{found.evaluation_seconds:,.0f}"),
            ("hours", f"{found.hours:,.1f}"),
            (f"GPU-hours, of {job.all_gpus:,} GPUs", f"{found.gpu_hours:,.0f}"),
        ]
    for row in rows:
        table.add_row(*row)
    return table


def _gb(value: float) -> str:
    return f"{value / 1e9:,.2f}"
