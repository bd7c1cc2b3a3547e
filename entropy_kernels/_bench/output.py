"""What `--bench` prints: machine, a table of plain characters, and how to read it."""

import textwrap
from statistics import median

import torch

from . import machine
from .measure import Measured
from .rounds import why_no_peak

WIDTH = 100
_COLUMNS = ("", "ms", "/ eager", "peak MB", "error")


def header(
    version: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    impl: str,
    why_torch: str,
) -> str:
    """Version, processor, threads, torch and its libraries, backend and instruction set."""
    about = machine.about(dtype)
    here = machine.processor()
    make = "" if here.make == here.name else f", {here.make}"
    lines = {
        "version": f"entropy_kernels {version}, torch {torch.__version__}, {about['blas']}",
        "processor": f"{here}{make}; {about['threads']} of {about['cores']} threads",
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        lines["GPU"] = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    backend = f"cpu, instruction set {about['instruction']}" if impl == "cpu" else impl
    why = f', which impl="auto" takes here because {why_torch}' if why_torch else ""
    lines["backend"] = backend + why
    tokens, hidden, vocabulary = shape
    lines["step"] = (
        f"{tokens:,} token{'s' * (tokens != 1)} x hidden size {hidden:,} x "
        f"vocabulary {vocabulary:,}, "
        f"{str(dtype).removeprefix('torch.')}, forward and backward"
    )
    return "\n".join(_wrapped(f"{name:<11}{text}") for name, text in lines.items())


def table(everyone: list[Measured]) -> str:
    """A row a contestant; under it why any was not timed."""
    timed = [one for one in everyone if one.samples]
    rows = [_row(one, everyone[0]) for one in timed]
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = []
    for row in [_COLUMNS, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("   ".join(cells).rstrip())
    refused = [f"{one.contestant.label}: {one.refused}" for one in everyone if one.refused]
    return "\n".join([*lines, *map(_wrapped, refused)])


def _row(one: Measured, eager: Measured) -> tuple[str, ...]:
    # In the rounds that both finished.
    pairs = zip(one.samples, eager.samples, strict=False)
    ratios = [x.wall_s / y.wall_s for x, y in pairs]
    peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:,.0f}"
    return (
        one.contestant.label,
        f"{1e3 * median(x.wall_s for x in one.samples):,.1f}",
        f"{median(ratios):.2f}" if ratios else "-",
        peak,
        f"{max(one.errors.values()):.0e}",
    )


def footer(everyone: list[Measured], device: torch.device, gradient_bytes: int) -> str:
    """How to read the table."""
    rounds = min((len(one.samples) for one in everyone if one.samples), default=0)
    peak = "peak: what a step needs at most beyond its inputs, its gradients' "
    peak += f"{gradient_bytes / 1e6:,.0f} MB included"
    why = why_no_peak(device)
    text = (
        f"ms: median of {rounds} round{'s' * (rounds != 1)} in which all alternate, and / eager "
        f"the median of its ratio within a round; "
        f"{f'peak is not measured: {why}' if why else peak}; error: the largest of loss, "
        "gradients, log-probs and entropies against fp64, relative to their norm, found before the "
        "timing. "
        "All others are told the tokens of the row of fewer than all, as a mask on their loss, and "
        "compute log-probs, entropies and gradients of all; no entropies: less than ours computes. "
        "Known beforehand: the tokens to train on come from the old policy's entropies."
    )
    return textwrap.fill(text, WIDTH)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * 11)
