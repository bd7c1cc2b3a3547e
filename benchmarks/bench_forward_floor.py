"""On one thread: forward of the head against the bare product that it contains, in CPU time.

The product is torch.mm's, in the inputs' dtype and in the tiles it likes best, results thrown
away. In fp32 that is MKL's; on AMD's processors oneDNN's is faster, so it stands beside it.

T tokens, D hidden, V vocabulary.
"""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import linear_logprob_entropy as op
from benchmarks import runner
from benchmarks.bench_linear_logprob_entropy import IDS, SHAPES
from benchmarks.linear_logprob_entropy import FLOOR_ROWS, FLOOR_VOCABULARY, Problem, head_of
from benchmarks.runner import Contestant
from entropy_kernels import ops
from entropy_kernels._bench.step import products_by_onednn

ROUNDS = 9
QUICK = (64, 32, 512), 2


@pytest.mark.timeout(0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: IDS(*shape))
def bench_forward_floor(shape, dtype, quick, record):
    if quick and shape != next(iter(SHAPES)):
        pytest.skip("--quick has one shape")
    shape, rounds = QUICK if quick else (shape, ROUNDS)
    record(functools.partial(measure, shape, dtype, rounds))


def measure(shape, dtype, rounds, folder, log=print):
    """The result file's entries."""
    tokens, hidden, vocabulary = shape
    problem = op.make_problem(tokens, hidden, vocabulary, dtype)
    with _one_thread():
        about = runner.about_this_run(dtype) | {
            "op": "forward_floor",
            "device": "cpu",
            "shape": {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
            "rounds": rounds,
        }
        log(f"forward on one thread, {tokens} x {hidden} x {vocabulary}, {about['dtype']}")
        entries = runner.run_suite(
            contestants(dtype), problem, truth, rounds=rounds, dtype=dtype, log=log
        )
    log(f"wrote {runner.write(folder, about, entries)}")
    return entries


def contestants(dtype: torch.dtype) -> list[Contestant]:
    """The first is what the others are compared with."""
    found = [Contestant("mm", "the product alone, torch.mm", _bare, exact=True)]
    if dtype == torch.float32:
        label = "the product alone, torch.mm by oneDNN"
        found.append(Contestant("mm-onednn", label, _bare_onednn, exact=True))
    for impl in ops.implementations():
        label = f"ours ({impl}): the product, log-probabilities and entropies"
        found.append(Contestant(impl, label, functools.partial(_forward, impl=impl), exact=True))
    return found


def truth(problem: Problem) -> dict[str, Tensor]:
    """What forward returns, and the last tile of the product."""
    last_R = problem.hidden.detach().split(FLOOR_ROWS)[-1].double()
    last_C = problem.weight.detach().split(FLOOR_VOCABULARY)[-1].double()
    return {
        "logprob": problem.logprob,
        "entropy": problem.entropy,
        "product": last_R @ last_C.T,
    }


def _forward(problem: Problem, *, impl: str) -> dict[str, Tensor]:
    with torch.no_grad():
        found = ek.linear_logprob_entropy(problem.hidden, problem.weight, problem.target, impl=impl)
    return {"logprob": found.logprob, "entropy": found.entropy}


def _bare(problem: Problem) -> dict[str, Tensor]:
    hidden_TD, weight_VD = problem.hidden.detach(), problem.weight.detach()
    block = hidden_TD.new_empty(FLOOR_ROWS, FLOOR_VOCABULARY)
    for weight in weight_VD.split(FLOOR_VOCABULARY):
        for hidden in hidden_TD.split(FLOOR_ROWS):
            tile = torch.mm(hidden, weight.T, out=head_of(block, len(hidden), len(weight)))
    return {"product": tile}


def _bare_onednn(problem: Problem) -> dict[str, Tensor]:
    with products_by_onednn():
        return _bare(problem)


@contextmanager
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
