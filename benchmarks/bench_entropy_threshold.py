"""The entropy that the top fifth of N tokens reach: ours against what PyTorch has for it.

Memory is what a call holds beyond the N entropies, which are 4 N bytes.
"""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import runner
from benchmarks.runner import Contestant, RefusedError

# The process that measures memory imports this module.
MODULE = "benchmarks.bench_entropy_threshold"
FRACTION = 0.2
# Numbers of entropies, with rounds.
SIZES = {10**5: 51, 10**6: 31, 10**7: 11, 10**8: 5}
QUICK = 20000, 2


class Problem(NamedTuple):
    """`count` is k: the threshold is the k-th largest entropy."""

    entropy: Tensor  # fp32 [N]
    count: int


@pytest.mark.timeout(0)
@pytest.mark.parametrize("size", SIZES, ids="N{}".format)
def bench_entropy_threshold(size, start, record):
    record(functools.partial(measure, *start(SIZES, size, QUICK)))


def measure(size, rounds, folder, log=print):
    """The result file's entries."""
    return runner.measure(
        "entropy_threshold",
        {"entropies": size},
        contestants(),
        make_problem(size),
        truth,
        rounds=rounds,
        folder=folder,
        log=log,
        watched=None if size in SIZES else 1,
        module=MODULE,
    )


def make_problem(size: int) -> Problem:
    """Half of the entropies below 0.01 nats, the 80th percentile at 0.672: the paper's."""
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([0.0, 0.5, 0.8, 1.0])
    logs = torch.tensor([1e-6, 0.01, 0.672, 3.5]).log()
    u_N = torch.rand(size, generator=generator)
    piece_N = torch.bucketize(u_N, places[1:-1])
    slope = logs.diff() / places.diff()
    entropy_N = (logs[piece_N] + (u_N - places[piece_N]) * slope[piece_N]).exp()
    return Problem(entropy_N, -(-size // 5))


def small_problem(like: Problem) -> Problem:
    """A small problem, whose run loads libraries and starts threads."""
    return make_problem(64)


def truth(problem: Problem) -> dict[str, Tensor]:
    """A sort gives the k-th largest entropy."""
    ordered_N = problem.entropy.sort().values
    return {"threshold": ordered_N[-problem.count].double()}


def contestants() -> list[Contestant]:
    """The first is what the others are compared with."""
    return [
        Contestant("kthvalue", "torch.kthvalue", _kthvalue),
        Contestant("topk", "torch.topk, its last", _topk),
        Contestant("sort", "torch.sort, the k-th", _sort),
        Contestant("quantile", "torch.quantile, which interpolates", _quantile),
        Contestant("ours", "ours: histograms of digits", _ours),
    ]


def _kthvalue(problem: Problem) -> dict[str, Tensor]:
    k = len(problem.entropy) - problem.count + 1
    return {"threshold": problem.entropy.kthvalue(k).values}


def _topk(problem: Problem) -> dict[str, Tensor]:
    return {"threshold": problem.entropy.topk(problem.count).values[-1]}


def _sort(problem: Problem) -> dict[str, Tensor]:
    # A view would keep the sorted copy alive.
    return {"threshold": problem.entropy.sort().values[-problem.count].clone()}


def _quantile(problem: Problem) -> dict[str, Tensor]:
    try:
        return {"threshold": torch.quantile(problem.entropy, 1 - FRACTION)}
    except RuntimeError as error:
        raise RefusedError(str(error)) from error


def _ours(problem: Problem) -> dict[str, Tensor]:
    return {"threshold": ek.entropy_threshold(problem.entropy, fraction=FRACTION)}
