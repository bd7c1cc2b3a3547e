"""The head against the bare products that it contains: forward and backward, on one thread and all.

Forward contains one product of T x D x V, backward three of those of the tokens that carry
gradient: the logits again, and both gradients. The bare ones are torch.mm's in the inputs' dtype
and in the blocks it likes best; logits are thrown away. In fp32 that is MKL's; on AMD's processors
oneDNN's is faster, so it stands beside it. The weight's gradient goes to memory that is there: the
bare product writes it, ours adds to it. A second entry of ours takes fresh memory, whose pages the
system clears. On one thread CPU time counts, on all of them wall time.

TRL's head and torch's in chunks have the same products, and take fresh memory. The latter computes
no entropies. Backward of both is given the rows that carry gradient.

T tokens, D hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import linear_logprob_entropy as op
from benchmarks import runner
from benchmarks.bench_linear_logprob_entropy import IDS, SHAPES
from benchmarks.head_tables import OURS
from benchmarks.linear_logprob_entropy import FLOOR_VOCABULARY, FRACTION, Problem, head_of
from benchmarks.runner import Contestant, Results
from entropy_kernels import backends
from entropy_kernels._bench.others import torch_head, trl_head
from entropy_kernels._bench.step import EagerHead, our_forward, products_by_onednn

QUICK = (64, 32, 512), 2
# Rows of hidden states in a block of a bare product, at most.
BLOCK = {"forward": 512, "backward": 1024}
DIRECTIONS = tuple(BLOCK)
# Others' heads that recompute logits in backward, so their products are those of ours.
OTHERS: dict[str, EagerHead] = {
    "trl": trl_head,
    "lce-chunked": functools.partial(torch_head, chunked=True),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: IDS(*shape))
def bench_head_floor(shape, dtype, start, record):
    shape, rounds = start(SHAPES, shape, QUICK)
    record(functools.partial(measure, shape, dtype, rounds))


def measure(shape, dtype, rounds, folder, log=print):
    """The result file's entries."""
    tokens, hidden, vocabulary = shape
    problem = op.make_problem(tokens, hidden, vocabulary, dtype, (FRACTION,))
    return runner.measure(
        "head_floor",
        {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
        contestants(problem),
        problem,
        truth,
        rounds=rounds,
        folder=folder,
        dtype=dtype,
        log=log,
    )


def contestants(problem: Problem) -> list[Contestant]:
    """For each direction and number of threads: the bare products, then ours."""
    found = []
    for direction in DIRECTIONS:
        for threads in sorted({1, torch.get_num_threads()}):
            for name, run in _runs(problem, direction).items():
                found.append(
                    Contestant(
                        f"{direction}-{name}-{threads}",
                        f"{direction}, {name}, threads: {threads}",
                        functools.partial(_on, threads, run),
                        {"direction": direction},
                        exact=name not in OTHERS,
                        counted=functools.partial(_bare, direction=direction, dweight_VD=None)
                        if name in OTHERS and direction == "forward"
                        else None,
                        needs=("trl",) if name == "trl" else (),
                    )
                )
    return found


def _runs(problem: Problem, direction: str) -> dict[str, Callable[[Problem], Results]]:
    """The calls to time, by name; ours takes the compiled kernels where they are built."""
    buffer = torch.zeros_like(problem.weight) if direction == "backward" else None
    bare = functools.partial(_bare, direction=direction, dweight_VD=buffer)
    runs: dict[str, Callable[[Problem], Results]] = {"mm": bare}
    if problem.hidden.dtype == torch.float32:
        runs["mm-onednn"] = functools.partial(bare, onednn=True)
    impl = OURS if OURS in backends.available() else "torch"
    if direction == "forward":
        runs[impl] = functools.partial(our_forward, impl=impl)
    else:
        runs[impl] = _backward(problem, impl, torch.zeros_like(problem.weight))
        runs[f"{impl}-fresh"] = _backward(problem, impl, None)
    for name, head in OTHERS.items():
        alone = _other_forward if direction == "forward" else _other_backward()
        runs[name] = functools.partial(alone, head=head)
    return runs


def _other_forward(problem: Problem, head: EagerHead) -> Results:
    with torch.no_grad():
        logprob_T, entropy_T = head(problem.hidden, problem.weight, problem.target)
    found = {"logprob": logprob_T}
    return found if entropy_T is None else found | {"entropy": entropy_T}


def _other_backward() -> Callable[..., Results]:
    """Backward alone; the first call, which is the one that is checked, has the forward too."""
    graph: list[Tensor] = []

    def run(problem: Problem, head: EagerHead) -> Results:
        rows = _rows(problem, "backward")
        if not graph:
            hidden_RD = problem.hidden.detach()[rows].requires_grad_()
            weight_VD = problem.weight.detach().requires_grad_()
            graph.extend(
                [head(hidden_RD, weight_VD, problem.target[rows])[0], hidden_RD, weight_VD]
            )
        logprob_R, *leaves = graph
        grad_R = problem.advantage[rows].to(logprob_R.dtype)
        found = torch.autograd.grad(logprob_R, leaves, grad_R, retain_graph=True)
        return dict(zip(("dhidden", "dweight"), found, strict=True))

    return run


def truth(problem: Problem, direction: str) -> Results:
    """The results of ours, and the last tile of the bare product."""
    rows = _rows(problem, direction)
    hidden_RD, weight_VD = problem.hidden.detach()[rows], problem.weight.detach()
    last_CD = weight_VD.split(FLOOR_VOCABULARY)[-1].double()
    tile = {"product": hidden_RD.split(_block(hidden_RD, direction))[-1].double() @ last_CD.T}
    if direction == "forward":
        return tile | {"logprob": problem.logprob, "entropy": problem.entropy}
    dhidden_RD = torch.zeros(hidden_RD.shape, dtype=torch.float64)
    dweight_VD = torch.zeros(weight_VD.shape, dtype=torch.float64)
    grad_R, target_R = problem.advantage[rows].double(), problem.target[rows]
    for part in torch.arange(len(hidden_RD)).split(128):
        hidden = hidden_RD[part].double()
        dz = -(hidden @ weight_VD.double().T).softmax(1)
        dz[torch.arange(len(part)), target_R[part]] += 1
        dz *= grad_R[part].unsqueeze(1)
        dhidden_RD[part] = dz @ weight_VD.double()
        dweight_VD.addmm_(dz.T, hidden)
    return tile | {"dhidden": dhidden_RD, "dweight": dweight_VD}


def _rows(problem: Problem, direction: str) -> Tensor:
    """The tokens that this direction computes."""
    return problem.selected[FRACTION] if direction == "backward" else problem.mask


def _block(hidden_RD: Tensor, direction: str) -> int:
    """Rows per block: equal blocks, since a short last one would slow the bare product."""
    blocks = -(-len(hidden_RD) // BLOCK[direction])
    return -(-len(hidden_RD) // blocks)


def _on(threads: int, run: Callable[[Problem], Results], problem: Problem) -> Results:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run(problem)
    finally:
        torch.set_num_threads(before)


def _bare(
    problem: Problem, *, direction: str, dweight_VD: Tensor | None, onednn: bool = False
) -> Results:
    hidden_RD = problem.hidden.detach()[_rows(problem, direction)]
    weight_VD, size = problem.weight.detach(), _block(hidden_RD, direction)
    block = hidden_RD.new_empty(size, FLOOR_VOCABULARY)
    dhidden_RD = hidden_RD.new_empty(size, hidden_RD.shape[1])
    # Forward has no use for the second of each pair.
    dweights = (weight_VD if dweight_VD is None else dweight_VD).split(FLOOR_VOCABULARY)
    with products_by_onednn() if onednn else nullcontext():
        for weight, dweight in zip(weight_VD.split(FLOOR_VOCABULARY), dweights, strict=True):
            for hidden in hidden_RD.split(size):
                tile = torch.mm(hidden, weight.T, out=head_of(block, len(hidden), len(weight)))
                if dweight_VD is not None:
                    torch.mm(tile.T, hidden, out=dweight)
                    torch.mm(tile, weight, out=dhidden_RD[: len(hidden)])
    return {"product": tile}


def _backward(problem: Problem, impl: str, buffer: Tensor | None) -> Callable[[Problem], Results]:
    """Backward alone, of a forward that is done here; the weight's gradient goes to `buffer`.

    The first call, which is the one that is checked, finds zeros there.
    """
    rows = _rows(problem, "backward")
    hidden_RD = problem.hidden.detach()[rows].requires_grad_()
    weight_VD = problem.weight.detach().requires_grad_()
    found = ek.linear_logprob_entropy(
        ek.Head(hidden_RD, weight_VD, problem.target[rows]), main_grad=buffer, impl=impl
    )
    grad_R = problem.advantage[rows].to(found.logprob.dtype)

    def run(problem: Problem) -> Results:
        hidden_RD.grad = weight_VD.grad = None
        found.logprob.backward(grad_R, retain_graph=True)
        return {
            "dhidden": hidden_RD.grad,
            "dweight": weight_VD.grad if buffer is None else buffer.detach(),
        }

    return run
