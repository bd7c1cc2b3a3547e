"""A plan as tables on a terminal, or as JSON."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.plan import Plan
from trainer.plan.flops import Flops, head_units, unit
from trainer.plan.job import Assumptions
from trainer.plan.memory import eager_logits, engine_room
from trainer.plan.timing import Seconds, collective_seconds, slots

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
        console.print(line, highlight=False)
    for table in (_memory(plan), _flops(plan), _head(plan)):
        console.print(table)
    if plan.seconds is not None:
        console.print(_time(plan.seconds))
    console.print("Assumed, not measured:", highlight=False)
    for line in assumptions(plan):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


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
        "eager_logits_bytes": eager_logits(job),
        "flops": plan.flops._asdict(),
        "head": {
            name: {"units": units, "share": plan.head_share(units)}
            for name, units in head_variants(plan).items()
        },
        "seconds": plan.seconds and plan.seconds._asdict() | {"step": plan.seconds.step},
        "assumptions": dataclasses.asdict(job.assumptions),
    }


def head_variants(plan: Plan) -> dict[str, float]:
    """Units of the head in an update, by how it is computed."""
    fraction = plan.job.config.algorithm.fraction
    return {
        "eager logits [T, V]": 3.0,
        "compaction: 1 + 3f": 1 + 3 * fraction,
        "threshold known, logits kept: 1 + 2f": 1 + 2 * fraction,
        "mask known, recomputed: 4f": 4 * fraction,
        "mask known, logits kept: 3f": 3 * fraction,
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
        f"all responses have {job.response:,.0f} tokens, but one of each engine reaches the limit",
        "GPUs are evenly loaded; no padding; collectives hide behind computation or the reverse",
        "verification, the optimizer and everything that is no matrix product take no time",
    ]
    return lines


def _summary(plan: Plan) -> list[str]:
    job, (phase, most) = plan.job, plan.peak
    name, size = plan.largest_part
    room = job.device.memory
    verdict = f"{_gb(most)} of {_gb(room)} GB a GPU at the peak ({phase})"
    if plan.fits:
        verdict = f"fits: {verdict}"
    elif most > room:
        verdict = f"does not fit: {verdict}; the largest part: {name}, {_gb(size)} GB"
    lines = [
        f"{job.config.name}: {job.architecture.parameters / 1e9:.2f} G parameters on {job.gpus} "
        f"GPUs, {job.nodes} nodes; {job.sequences:,} sequences a step, "
        f"{job.sequences_per_update:,} an update, {job.micro_batches} micro-batches of at most "
        f"{job.micro_batch:,} tokens an update and GPU",
        verdict,
    ]
    if not plan.engine_starts:
        lines.append(
            f"vLLM does not start: engine.memory_utilization leaves {_gb(-engine_room(job))} GB "
            "too little for its weights and one sequence of engine.max_model_len"
        )
    return lines


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
    table = Table(
        title=f"The head, f = {plan.job.config.algorithm.fraction:g}", title_justify="left"
    )
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


def _gb(value: float) -> str:
    return f"{value / 1e9:,.2f}"
