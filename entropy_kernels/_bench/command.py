"""`python -m entropy_kernels --bench`: eager, others' heads and ours in alternation, here.

Results are checked against fp64 first, and what is wrong is not timed.
"""

import argparse
import math
import os
import platform
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..backends import OPS
from ..head import Head
from . import machine
from .entrants import HOLD_LOGITS, entrants
from .measure import Measured, measure
from .output import footer, header, table
from .result_text import result_text
from .step import ROWS, make_problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# About 20 s on two cores, most of it torch.compile's compiler and the rounds.
CPU_SHAPE = (512, 512, 32768)
# Heads of an 8B and of smaller models; the first that leaves room is measured.
GPU_SHAPES = ((8192, 4096, 151936), (4096, 2048, 151936), (2048, 1024, 32768))
FRACTION, ROUNDS = 0.2, 5
# Tokens that are drawn; more are these again.
DISTINCT = 128
# The fp32 copies of all logits that eager holds at most.
LOGITS = 3.5
STOPPED = 130


@dataclass(frozen=True)
class Plan:
    """What is measured, after its options were checked."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    fraction: float
    device: torch.device
    rounds: int
    impl: str
    """The backend that was named, or what "auto" stands for there."""
    why_torch: str
    """Why "auto" stands for torch; empty where it does not."""
    too_large: str
    """Why what holds all logits is left out; empty where it is not."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of --bench; each is None where it was not given."""
    group = parser.add_argument_group("options of --bench")
    group.add_argument(
        "--shape",
        nargs=3,
        type=_natural,
        metavar=("T", "D", "V"),
        help="tokens, hidden size, vocabulary (default: {} {} {}; on a GPU {} {} {} where they "
        "fit)".format(*CPU_SHAPE, *GPU_SHAPES[0]),
    )
    group.add_argument(
        "--dtype",
        type=lambda text: SHORT.get(text, text),
        choices=list(DTYPES),
        help="of hidden states and weight (default: float32, in which models are trained on CPUs; "
        "on a GPU bfloat16)",
    )
    group.add_argument(
        "--fraction", type=_fraction, help=f"of the tokens, to train on (default: {FRACTION})"
    )
    group.add_argument("--device", type=_device, help="cpu or cuda[:N] (default: a GPU if any)")
    group.add_argument(
        "--impl",
        choices=[name for name in OPS["linear_logprob_entropy"].impls if name != "reference"],
        help="the backend of ours (default: auto, the fastest that is known to be right there)",
    )
    group.add_argument("--rounds", type=_natural, help=f"of the alternation (default: {ROUNDS})")
    group.add_argument("--threads", type=_threads, help="of torch on a CPU (default: torch's own)")
    what = "writes all samples there; of --verify all answers, printed without FILE"
    group.add_argument("--json", type=_new_file, nargs="?", const=True, metavar="FILE", help=what)


OPTIONS = ("shape", "dtype", "fraction", "device", "impl", "rounds", "threads", "json")


def main(options: argparse.Namespace, parser: argparse.ArgumentParser, version: str) -> int:
    """Measure and print; returns the exit status: 1 if one of ours is wrong, 130 after Ctrl-C."""
    if options.json is True:
        parser.error("argument --json: it needs a FILE")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads or before)
        plan = _plan(options, parser)
        on_gpu = plan.device.type == "cuda"
        with torch.cuda.device(plan.device) if on_gpu else nullcontext():
            return _run(plan, options.json, version)
    finally:
        torch.set_num_threads(before)


def _plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = default if options.device is None else options.device
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    free = machine.available_bytes(device)
    if options.shape:
        shape = tuple(options.shape)
    elif device.type == "cpu":
        shape = CPU_SHAPE
    else:
        fits = [x for x in GPU_SHAPES if free is None or LOGITS * logits_bytes(x) < free / 2]
        shape = [*fits, GPU_SHAPES[-1]][0]
    wanted = problem_bytes(shape, dtype)
    if free is not None and wanted > free:
        parser.error(
            f"argument --shape: inputs, gradients and their truth in fp64 need about "
            f"{_gigabytes(wanted)}; {_gigabytes(free)} are available on {device}"
        )
    eager = wanted + LOGITS * logits_bytes(shape)
    too_large = ""
    if free is not None and eager > free:
        too_large = (
            f"not timed: with all logits it needs about {_gigabytes(eager)}; "
            f"{_gigabytes(free)} are available"
        )
    asked = options.impl or "auto"
    try:
        with warnings.catch_warnings():
            # It is printed with the rest.
            warnings.simplefilter("ignore")
            impl = backends.resolve_head(asked, _head_like(shape[1], dtype, device))
    except ValueError as error:
        parser.error(f"argument --impl: {error}")
    why_torch = backends.why_torch(device) if (asked, impl) == ("auto", "torch") else ""
    fraction = FRACTION if options.fraction is None else options.fraction
    rounds = options.rounds or ROUNDS
    return Plan(shape, dtype, fraction, device, rounds, impl, why_torch, too_large)


def _head_like(hidden: int, dtype: torch.dtype, device: torch.device) -> Head:
    """One row of a head that is trained."""
    x = torch.zeros(1, hidden, dtype=dtype, device=device).requires_grad_()
    return Head(x, x, torch.zeros(1, dtype=torch.int64, device=device), temperature=None)


def _run(plan: Plan, file: Path | None, version: str) -> int:
    device, dtype = plan.device, plan.dtype
    print(header(version, device, dtype, plan.shape, plan.impl, plan.why_torch) + "\n", flush=True)
    everyone = [Measured(x) for x in entrants(plan.impl, device, dtype, plan.fraction)]
    for one in everyone:
        if one.contestant.name in HOLD_LOGITS:
            one.refused = plan.too_large
    stopped = ""
    try:
        fractions = tuple({1.0, plan.fraction})
        problem = make_problem(*plan.shape, dtype, fractions, device, DISTINCT)
        measure(problem, everyone, plan.rounds)
    except KeyboardInterrupt:
        rounds = min((len(x.samples) for x in everyone if x.errors), default=0)
        stopped = f"stopped by Ctrl-C after {rounds} of {plan.rounds} rounds"
    tokens, hidden, vocabulary = plan.shape
    if any(one.samples or one.refused for one in everyone):
        print(table(everyone) + "\n")
        gradient_bytes = (tokens + vocabulary) * hidden * dtype.itemsize
        print(footer(everyone, device, gradient_bytes))
    if file is not None:
        file.write_text(result_text(_result(plan, everyone, version)))
    if stopped:
        print(stopped)
        return STOPPED
    return int(any(one.failed for one in everyone))


def _result(plan: Plan, everyone: list[Measured], version: str) -> dict[str, Any]:
    """As the result files of the benchmarks."""
    names = "tokens", "hidden", "vocabulary"
    versions = {"python": platform.python_version(), "entropy_kernels": version}
    return machine.about(plan.dtype) | {
        "op": "linear_logprob_entropy",
        "device": str(plan.device),
        "impl": plan.impl,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "shape": dict(zip(names, plan.shape, strict=True)),
        "fraction": plan.fraction,
        "rounds": plan.rounds,
        "versions": versions | {"torch": str(torch.__version__)},
        "contestants": [one.as_entry() for one in everyone],
    }


def logits_bytes(shape: tuple[int, int, int]) -> int:
    """All logits once, in fp32."""
    return 4 * shape[0] * shape[2]


def problem_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """The weight and its gradient, both also in fp64, and a block of logits in fp64."""
    tokens, hidden, vocabulary = shape
    return (tokens + vocabulary) * hidden * (2 * dtype.itemsize + 16) + 3 * 8 * ROWS * vocabulary


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _natural(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more; got {text}")
    return value


def _threads(text: str) -> int:
    value, cores = _natural(text), os.cpu_count() or 1
    if value > cores:
        raise argparse.ArgumentTypeError(f"must be at most {cores}, the machine's; got {text}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1; got {text}")
    return value


def _device(text: str) -> torch.device:
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    name = "cuda:0" if text == "cuda" else text
    if name not in here:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(here)}; got {text}")
    return torch.device(name)


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there; got {text}")
    there = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        raise argparse.ArgumentTypeError(f"must be writable; got {text}: {why}") from None
    if not there:
        path.unlink()
    return path
