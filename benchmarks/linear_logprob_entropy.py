"""The contestants of linear_logprob_entropy: one policy-gradient step through the LM head.

A step goes from hidden states and the head's weight to the clipped loss of the tokens of highest
entropy, and to the gradients of both. Every contestant computes the entropies of all tokens, except
those that are told the tokens beforehand and those whose label says that they have none; and none
differentiates them.

T tokens, D hidden, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.runner import Contestant
from entropy_kernels import _rows, backends
from entropy_kernels._bench import step
from entropy_kernels._bench.contestant import TOLD
from entropy_kernels._bench.entrants import our_contestant
from entropy_kernels._bench.step import (
    Problem,
    dense,
    dense_by_onednn,
    our_forward,
    plain_head,
    truth,
)

__all__ = ["Problem", "truth"]

FRACTION = 0.2
FRACTIONS = (1.0, 0.5, 0.2, 0.1)
# Blocks of the bare products: the fastest of those that leave no [T, V] behind.
FLOOR_ROWS, FLOOR_VOCABULARY = 512, 2048


def make_problem(
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    fractions: tuple[float, ...] = FRACTIONS,
) -> Problem:
    """The step's inputs; no token is another one's copy."""
    return step.make_problem(tokens, hidden, vocabulary, dtype, fractions)


def small_problem(like: Problem) -> Problem:
    """A small problem, whose run loads libraries and starts threads."""
    return make_problem(64, 32, 256, like.hidden.dtype)


def _liger_grpo(problem: Problem, *, compiled: bool) -> dict[str, Tensor]:
    loss = peers.liger_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        problem.old_logprob,
        problem.advantage,
        problem.selected[FRACTION],
        compiled=compiled,
    )
    return step.step(problem.hidden, problem.weight, loss)


def _floor(problem: Problem) -> dict[str, Tensor]:
    """The products of one step at FRACTION and nothing else, by torch.mm in the inputs' dtype."""
    hidden_TD, weight_VD = problem.hidden.detach(), problem.weight.detach()
    active = int(problem.selected[FRACTION].sum())
    block = hidden_TD.new_empty(FLOOR_ROWS, FLOOR_VOCABULARY)
    dhidden_TD = hidden_TD.new_empty(FLOOR_ROWS, hidden_TD.shape[1])
    dweight_VD = weight_VD.new_empty(FLOOR_VOCABULARY, weight_VD.shape[1])
    for weight in weight_VD.split(FLOOR_VOCABULARY):
        for hidden in hidden_TD.split(FLOOR_ROWS):
            torch.mm(hidden, weight.T, out=head_of(block, len(hidden), len(weight)))
        for hidden in hidden_TD[:active].split(FLOOR_ROWS):
            z = torch.mm(hidden, weight.T, out=head_of(block, len(hidden), len(weight)))
            torch.mm(z.T, hidden, out=dweight_VD[: len(weight)])
            torch.mm(z, weight, out=dhidden_TD[: len(hidden)])
    return {}


def head_of(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The first elements of a buffer as a [rows, columns] block."""
    return buffer.view(-1)[: rows * columns].view(rows, columns)


def contestants(
    impls: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float32
) -> list[Contestant]:
    """Those for inputs of `dtype`. The first is what the others are compared with."""
    setting = {"fraction": FRACTION}
    at = {"fraction": FRACTION}
    plain, compiled = (partial(dense, plain_head, **at, compiled=x) for x in (False, True))
    found = [
        Contestant(
            peer.name,
            peer.label,
            partial(dense, peer.head, **at),
            setting,
            uncompiled=plain if peer.compiled else None,
            counted=partial(dense, peer.counted, **at) if peer.counted else None,
            needs=peer.needs,
            computes=peer.computes,
        )
        for peer in peers.heads()
    ]
    if dtype == torch.float32:
        # Its own place is beside eager, whose head it has.
        by_onednn = partial(dense_by_onednn, peers.heads()[0].head, **at)
        label = f"{found[0].label}, oneDNN's products"
        found.insert(1, Contestant("eager-onednn", label, by_onednn, setting, computes=TOLD))
    label = "torch.compile of all logits"
    found.append(Contestant("compile", label, compiled, setting, uncompiled=plain, computes=TOLD))
    found.append(
        Contestant(
            "liger-grpo",
            "Liger's fused GRPO loss, no entropies",
            partial(_liger_grpo, compiled=True),
            setting,
            uncompiled=partial(_liger_grpo, compiled=False),
            needs=("liger_kernel",),
            computes=("loss", "gradients"),
        )
    )
    for impl in backends.available() if impls is None else impls:
        found += _our_contestants(impl)
    label = f"floor: the products of {FRACTION:.0%} by torch.mm alone"
    return [*found, Contestant("floor", label, _floor, setting)]


def _our_contestants(impl: str) -> list[Contestant]:
    found = [our_contestant(impl, fraction) for fraction in FRACTIONS]
    found.append(our_contestant(impl, FRACTION, known=True))
    found.append(our_contestant(impl, FRACTION, half=True))
    setting = {"fraction": FRACTION}
    label = f"ours ({impl}), forward alone"
    for name, more, statistics in (
        (f"{impl}-forward", "", ()),
        (f"{impl}-forward-statistics", ", with all statistics", _rows.filled(impl)),
    ):
        run = partial(our_forward, impl=impl, statistics=statistics)
        computes = "log-probs", "entropies"
        found.append(Contestant(name, label + more, run, setting, exact=True, computes=computes))
    return found
