"""The contestants of linear_logprob_entropy: one policy-gradient step through the LM head.

A step goes from hidden states and the head's weight to the clipped loss of the tokens of highest
entropy, and to the gradients of both. Every contestant computes the entropies of all tokens, except
those that are told the tokens beforehand and those whose label says that they have none; and none
differentiates them. The dense contestants are given the selection as a mask on their loss, which is
what trainers do; ours finds it.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import peers
from benchmarks.peers import SEQUENCES, Head
from benchmarks.runner import Contestant
from entropy_kernels import ops
from entropy_kernels.testing import peaked_head

FRACTION = 0.2
FRACTIONS = (1.0, 0.5, 0.2, 0.1)
# Blocks of the bare products: the fastest of those that leave no [T, V] behind.
FLOOR_ROWS, FLOOR_VOCABULARY = 512, 2048


class Problem(NamedTuple):
    """One step's inputs. `selected` marks the tokens of highest entropy for each fraction."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    old_logprob: Tensor  # fp32 [T]
    advantage: Tensor  # fp32 [T], one value a sequence
    half_advantage: Tensor  # the same, zero for every other sequence
    mask: Tensor  # [T], all true
    logprob: Tensor  # fp64 [T]: the truth
    entropy: Tensor  # fp64 [T]: the truth
    selected: dict[float, Tensor]


def make_problem(
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    fractions: tuple[float, ...] = FRACTIONS,
) -> Problem:
    """Entropies of a reasoning model, ratios a few per cent off 1, one advantage a sequence."""
    hidden_TD, weight_VD, target_T = peaked_head(tokens, hidden, vocabulary, dtype=dtype)
    logprob_T, entropy_T = _truth(hidden_TD, weight_VD, target_T)
    generator = torch.Generator().manual_seed(1)
    noise_T = 0.02 * torch.randn(tokens, generator=generator)
    advantage_B = torch.randn(SEQUENCES, generator=generator)
    sequence_T = torch.arange(tokens) * SEQUENCES // tokens
    half_B = advantage_B * (torch.arange(SEQUENCES) % 2)
    return Problem(
        hidden_TD.requires_grad_(),
        weight_VD.requires_grad_(),
        target_T,
        (logprob_T.float() + noise_T).clamp_max(0),
        advantage_B[sequence_T],
        half_B[sequence_T],
        torch.ones(tokens, dtype=torch.bool),
        logprob_T,
        entropy_T,
        {f: ek.top_entropy_mask(entropy_T.float(), fraction=f) for f in fractions},
    )


def small_problem(like: Problem) -> Problem:
    """What loads libraries and starts threads."""
    return make_problem(64, 32, 256, like.hidden.dtype)


def policy_loss(
    logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, selected_T: Tensor
) -> Tensor:
    """The clipped loss (arXiv 2506.01939v2, equation 6), as a trainer writes it."""
    ratio_T = (logprob_T - old_logprob_T).exp()
    clipped_T = ratio_T.clamp(0.8, 1.28)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    return (loss_T * selected_T).sum() / selected_T.sum()


def truth(problem: Problem, fraction: float, half: bool) -> dict[str, Tensor]:
    """What every contestant should return, in fp64 from the inputs as they are."""
    advantage_T = problem.half_advantage if half else problem.advantage
    selected_T = problem.selected[fraction]
    logprob_T = problem.logprob.clone().requires_grad_()
    loss = policy_loss(logprob_T, problem.old_logprob.double(), advantage_T.double(), selected_T)
    (grad_T,) = torch.autograd.grad(loss, logprob_T)
    weight_VD = problem.weight.detach().double()
    dhidden_TD = torch.zeros(problem.hidden.shape, dtype=torch.float64)
    dweight_VD = torch.zeros_like(weight_VD)
    for rows_R in grad_T.nonzero().squeeze(1).split(256):
        hidden_RD = problem.hidden.detach()[rows_R].double()
        dz_RV = -(hidden_RD @ weight_VD.T).softmax(1)
        dz_RV[torch.arange(len(rows_R)), problem.target[rows_R]] += 1
        dz_RV *= grad_T[rows_R].unsqueeze(1)
        dhidden_TD[rows_R] = dz_RV @ weight_VD
        dweight_VD.addmm_(dz_RV.T, hidden_RD)
    return {
        "loss": loss.detach(),
        "dhidden": dhidden_TD,
        "dweight": dweight_VD,
        "logprob": problem.logprob,
        "entropy": problem.entropy,
    }


def _truth(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    weight_VD = weight_VD.double()
    logprob_T, entropy_T = torch.empty(2, len(target_T), dtype=torch.float64)
    for rows in torch.arange(len(target_T)).split(256):
        logp_RV = (hidden_TD[rows].double() @ weight_VD.T).log_softmax(1)
        logprob_T[rows] = logp_RV.gather(1, target_T[rows].unsqueeze(1)).squeeze(1)
        entropy_T[rows] = -(logp_RV.exp() * logp_RV).sum(1)
    return logprob_T, entropy_T


def _step(problem: Problem, loss: Tensor) -> dict[str, Tensor]:
    dhidden_TD, dweight_VD = torch.autograd.grad(loss, [problem.hidden, problem.weight])
    return {"loss": loss.detach(), "dhidden": dhidden_TD, "dweight": dweight_VD}


def _dense(head: Head, problem: Problem, *, compiled: bool = False) -> dict[str, Tensor]:
    """The loss of all tokens, times a mask."""
    inputs = problem.hidden, problem.weight, problem.target, problem.old_logprob, problem.advantage
    objective = _compiler() if compiled else _objective
    loss, found = objective(head, *inputs, problem.selected[FRACTION])
    return _step(problem, loss) | found


def _objective(
    head: Head,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    selected_T: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what the head found: a compiler would drop what nobody reads."""
    logprob_T, entropy_T = head(hidden_TD, weight_VD, target_T)
    loss = policy_loss(logprob_T, old_logprob_T, advantage_T, selected_T)
    found = {"logprob": logprob_T.detach()}
    return loss, found if entropy_T is None else found | {"entropy": entropy_T.detach()}


@cache
def _compiler() -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    return torch.compile(_objective)


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
    return _step(problem, loss)


def ours(
    problem: Problem, *, impl: str, fraction: float, known: bool = False, half: bool = False
) -> dict[str, Tensor]:
    """Our step: `known`, the tokens are told beforehand; `half`, of the advantages are zero."""
    loss, _ = ek.high_entropy_policy_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        problem.old_logprob,
        problem.half_advantage if half else problem.advantage,
        problem.mask,
        fraction=fraction,
        selected=problem.selected[fraction] if known else None,
        impl=impl,
    )
    return _step(problem, loss)


def _our_forward(
    problem: Problem, *, impl: str, statistics: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    inputs = problem.hidden, problem.weight, problem.target
    with torch.no_grad():
        found = ek.linear_logprob_entropy(*inputs, statistics=statistics, impl=impl)
    return {"logprob": found.logprob, "entropy": found.entropy}


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


def contestants(impls: tuple[str, ...] | None = None) -> list[Contestant]:
    """The first is what the others are compared with."""
    setting = {"fraction": FRACTION, "half": False}
    plain, compiled = (partial(_dense, peers.plain_head, compiled=x) for x in (False, True))
    found = [
        Contestant(
            peer.name,
            peer.label,
            partial(_dense, peer.head),
            setting,
            uncompiled=plain if peer.compiled else None,
            needs=peer.needs,
        )
        for peer in peers.heads()
    ]
    label = "torch.compile of all logits"
    found.append(Contestant("compile", label, compiled, setting, uncompiled=plain))
    found.append(
        Contestant(
            "liger-grpo",
            "Liger's fused GRPO loss, no entropies",
            partial(_liger_grpo, compiled=True),
            setting,
            uncompiled=partial(_liger_grpo, compiled=False),
            needs=("liger_kernel",),
        )
    )
    for impl in ops.implementations() if impls is None else impls:
        found += _our_contestants(impl)
    label = f"floor: the products of {FRACTION:.0%} by torch.mm alone"
    return [*found, Contestant("floor", label, _floor, setting)]


def _our_contestants(impl: str) -> list[Contestant]:
    found = []
    for fraction, known, half in [
        *((fraction, False, False) for fraction in FRACTIONS),
        (FRACTION, True, False),
        (FRACTION, False, True),
    ]:
        name = f"{impl}-{fraction:g}" + "-known" * known + "-half" * half
        label = f"ours ({impl}), {fraction:.0%} of the tokens"
        label += ", known beforehand" * known + ", half of the advantages zero" * half
        run = partial(ours, impl=impl, fraction=fraction, known=known, half=half)
        found.append(Contestant(name, label, run, {"fraction": fraction, "half": half}, exact=True))
    setting = {"fraction": FRACTION, "half": False}
    label = f"ours ({impl}), forward alone"
    for name, more, statistics in (
        (f"{impl}-forward", "", ()),
        (f"{impl}-forward-statistics", ", with all statistics", ops.MOMENTS),
    ):
        run = partial(_our_forward, impl=impl, statistics=statistics)
        found.append(Contestant(name, label + more, run, setting, exact=True))
    return found
