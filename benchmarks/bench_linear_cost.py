"""How our step's cost grows: with tokens, with vocabulary, and with the fraction trained on.

Every point of the three sweeps is a contestant: checked against fp64, and timed in alternation with
all others. So are points of TRL's head and of torch's: those of few enough logits, and of the
fractions, which change nothing for them, the first and the last.

T tokens, D hidden, V vocabulary.
"""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import linear_logprob_entropy as op
from benchmarks import peers, runner
from benchmarks.linear_logprob_entropy import FRACTION, Problem
from benchmarks.runner import Contestant
from entropy_kernels import backends
from entropy_kernels._bench.step import EagerHead, dense, ours

# The peers that are measured beside ours, and the most logits that they are given.
OTHERS = ("trl", "lce")
OTHERS_LOGITS = 8192 * 32768
ROUNDS = 5
QUICK_ROUNDS = 2


class Sweeps(NamedTuple):
    """The values of each of the three sweeps, and the sizes that stay fixed meanwhile."""

    hidden: int
    distinct: int
    """The number of different tokens; larger problems repeat them, at the same cost."""
    tokens: tuple[int, ...]
    tokens_vocabulary: int
    vocabularies: tuple[int, ...]
    vocabularies_tokens: int
    fractions: tuple[float, ...]
    fractions_tokens: int


FULL = Sweeps(
    hidden=512,
    distinct=512,
    tokens=(512, 1024, 2048, 4096, 8192, 16384, 32768),
    tokens_vocabulary=32768,
    vocabularies=(8192, 16384, 32768, 65536, 131072, 262144),
    vocabularies_tokens=2048,
    fractions=(0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
    fractions_tokens=4096,
)
QUICK = Sweeps(
    hidden=16,
    distinct=64,
    tokens=(32, 128),
    tokens_vocabulary=256,
    vocabularies=(256, 512),
    vocabularies_tokens=64,
    fractions=(0.2, 0.6, 1.0),
    fractions_tokens=64,
)


class Point(NamedTuple):
    """One measurement: its sweep and the value there."""

    sweep: str
    value: float
    fraction: float
    problem: Problem


@pytest.mark.timeout(0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def bench_linear_cost(dtype, quick, record):
    sweeps, rounds = (QUICK, QUICK_ROUNDS) if quick else (FULL, ROUNDS)
    record(functools.partial(measure, sweeps, dtype, rounds))


def measure(sweeps, dtype, rounds, folder, log=print):
    """The result file's entries."""
    impl = "cpu" if "cpu" in backends.available() else "torch"
    points = make_points(sweeps, dtype)
    contestants = [
        Contestant(
            name,
            f"{point.sweep} {point.value:g}",
            functools.partial(_step, name=name, impl=impl),
            {"name": name},
            exact=True,
        )
        for name, point in points.items()
    ]
    contestants += _others(sweeps, points)
    point_of = {contestant.name: points[contestant.setting["name"]] for contestant in contestants}

    def more(entry):
        sweep, value, _, problem = point_of[entry["name"]]
        products = 2 * problem.hidden.numel() * len(problem.weight)
        who = entry["name"].removesuffix(f"{sweep}-{value:g}").rstrip("-") or "ours"
        return {"who": who, "sweep": sweep, "value": value, "units": entry["flops"] / products}

    return runner.measure(
        "linear_cost",
        {"hidden": sweeps.hidden},
        contestants,
        points,
        _truth,
        rounds=rounds,
        folder=folder,
        dtype=dtype,
        log=log,
        more=more,
        sweeps=sweeps._asdict(),
        fraction=FRACTION,
        impl=impl,
    )


def _others(sweeps: Sweeps, points: dict[str, Point]) -> list[Contestant]:
    """The same steps through the heads of `OTHERS`."""
    ends = sweeps.fractions[0], sweeps.fractions[-1]
    found = []
    for peer in peers.heads():
        for name, (sweep, value, fraction, problem) in points.items():
            logits = len(problem.target) * len(problem.weight)
            few = logits <= OTHERS_LOGITS and (sweep != "fraction" or value in ends)
            if peer.name in OTHERS and few:
                run = functools.partial(_dense, name=name, fraction=fraction, head=peer.head)
                label = f"{sweep} {value:g}, {peer.label}"
                at = {"name": name}
                found.append(
                    Contestant(
                        f"{peer.name}-{name}",
                        label,
                        run,
                        at,
                        needs=peer.needs,
                        computes=peer.computes,
                    )
                )
    return found


def _dense(
    points: dict[str, Point], *, name: str, fraction: float, head: EagerHead
) -> dict[str, Tensor]:
    return dense(head, points[name].problem, fraction=fraction)


def make_points(sweeps: Sweeps, dtype: torch.dtype) -> dict[str, Point]:
    """All points of all sweeps, by name; points with the same vocabulary share one weight."""
    bases = {
        vocabulary: op.make_problem(sweeps.distinct, sweeps.hidden, vocabulary, dtype, (FRACTION,))
        for vocabulary in {sweeps.tokens_vocabulary, *sweeps.vocabularies}
    }
    base = bases[sweeps.tokens_vocabulary]
    found = []
    for tokens in sweeps.tokens:
        found.append(Point("tokens", tokens, FRACTION, _resized(base, tokens, FRACTION)))
    for vocabulary in sweeps.vocabularies:
        problem = _resized(bases[vocabulary], sweeps.vocabularies_tokens, FRACTION)
        found.append(Point("vocabulary", vocabulary, FRACTION, problem))
    for fraction in sweeps.fractions:
        problem = _resized(base, sweeps.fractions_tokens, fraction)
        found.append(Point("fraction", fraction, fraction, problem))
    return {f"{point.sweep}-{point.value:g}": point for point in found}


def _resized(problem: Problem, tokens: int, fraction: float) -> Problem:
    """The first tokens, or all of them again and again."""
    row_T = torch.arange(tokens) % len(problem.target)
    entropy_T = problem.entropy[row_T]
    return Problem(
        problem.hidden.detach()[row_T].requires_grad_(),
        problem.weight,
        problem.target[row_T],
        problem.old_logprob[row_T],
        problem.advantage[row_T],
        problem.half_advantage[row_T],
        problem.mask[row_T],
        problem.logprob[row_T],
        entropy_T,
        {fraction: ek.top_entropy_mask(entropy_T.float(), fraction=fraction)},
    )


def _truth(points: dict[str, Point], name: str) -> dict[str, Tensor]:
    point = points[name]
    return op.truth(point.problem, point.fraction)


def _step(points: dict[str, Point], *, name: str, impl: str) -> dict[str, Tensor]:
    point = points[name]
    return ours(point.problem, impl=impl, fraction=point.fraction)
