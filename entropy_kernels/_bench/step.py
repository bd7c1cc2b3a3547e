"""One policy-gradient step through the LM head: its inputs, its truth in fp64, and ways to take it.

A step goes from hidden states and the head's weight to the clipped loss of the tokens of highest
entropy, and to the gradients of both. The dense ways are given the selection as a mask on their
loss, which is what trainers do; ours finds it.

T tokens, D hidden, V vocabulary, R rows of a block.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import testing
from ..head import Head
from ..high_entropy_policy_loss import high_entropy_policy_loss
from ..linear_logprob_entropy import linear_logprob_entropy
from ..options import Backend
from ..top_entropy_mask import top_entropy_mask
from ..verification.truth import peaked_head
from .contestant import RefusedError, Results

SEQUENCES = 8
ROWS = 256
_CPU = torch.device("cpu")

EagerHead = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class Problem(NamedTuple):
    """One step's inputs. `selected` marks the tokens of highest entropy for each fraction."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    old_logprob: Tensor  # fp32 [T]
    advantage: Tensor  # fp32 [T], one value per sequence
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
    fractions: tuple[float, ...],
    device: torch.device = _CPU,
    distinct: int | None = None,
) -> Problem:
    """Entropies of a reasoning model, ratios a few per cent off 1, one advantage per sequence.

    Beyond `distinct` tokens, the others are these again at slightly other scales: a peaked row is
    found by bisection, which costs more than a step.
    """
    drawn = min(tokens, distinct or tokens)
    if device == _CPU:
        hidden_TD, weight_VD, target_T = testing.peaked_head(drawn, hidden, vocabulary, dtype=dtype)
    else:
        hidden_TD, weight_VD, target_T = peaked_head(drawn, hidden, vocabulary, dtype, device, 0)
    if drawn < tokens:
        row_T = torch.arange(tokens, device=device) % drawn
        generator = torch.Generator().manual_seed(2)
        scale_T1 = 1 + 0.1 * torch.rand(tokens, 1, generator=generator).to(device)
        hidden_TD, target_T = (hidden_TD[row_T].float() * scale_T1).to(dtype), target_T[row_T]
    return problem_of(hidden_TD, weight_VD, target_T, fractions)


def problem_of(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, fractions: tuple[float, ...]
) -> Problem:
    """The step's inputs with given states, weight and targets; the rest is made up."""
    tokens, device = len(hidden_TD), hidden_TD.device
    generator = torch.Generator().manual_seed(1)
    noise_T = 0.02 * torch.randn(tokens, generator=generator).to(device)
    advantage_B = torch.randn(SEQUENCES, generator=generator)
    logprob_T, entropy_T = statistics(hidden_TD, weight_VD, target_T)
    sequence_T = torch.arange(tokens) * SEQUENCES // tokens
    half_B = advantage_B * (torch.arange(SEQUENCES) % 2)
    return Problem(
        hidden_TD.requires_grad_(),
        weight_VD.requires_grad_(),
        target_T,
        (logprob_T.float() + noise_T).clamp_max(0),
        advantage_B[sequence_T].to(device),
        half_B[sequence_T].to(device),
        torch.ones(tokens, dtype=torch.bool, device=device),
        logprob_T,
        entropy_T,
        {f: top_entropy_mask(entropy_T.float(), fraction=f) for f in fractions},
    )


def statistics(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities and entropies [T]."""
    weight = weight_VD.double()
    found = []
    for hidden, target in zip(hidden_TD.split(ROWS), target_T.split(ROWS), strict=True):
        logp_RV = (hidden.double() @ weight.T).log_softmax(1)
        logprob = logp_RV.gather(1, target.unsqueeze(1)).squeeze(1)
        found.append((logprob, torch.special.entr(logp_RV.exp_()).sum(1)))
    return torch.cat([x[0] for x in found]), torch.cat([x[1] for x in found])


def gradients(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, grad_T: Tensor
) -> tuple[Tensor, Tensor]:
    """fp64 gradients of hidden states and weight, from those of the log-probabilities."""
    weight_VD = weight_VD.detach().double()
    dhidden_TD = torch.zeros(hidden_TD.shape, dtype=torch.float64, device=grad_T.device)
    dweight_VD = torch.zeros_like(weight_VD)
    for rows_R in grad_T.nonzero().squeeze(1).split(ROWS):
        hidden_RD = hidden_TD.detach()[rows_R].double()
        dz_RV = (hidden_RD @ weight_VD.T).softmax(1).neg_()
        dz_RV[torch.arange(len(rows_R), device=grad_T.device), target_T[rows_R]] += 1
        dz_RV *= grad_T[rows_R].unsqueeze(1)
        dhidden_TD[rows_R] = dz_RV @ weight_VD
        dweight_VD.addmm_(dz_RV.T, hidden_RD)
    return dhidden_TD, dweight_VD


def truth(problem: Problem, fraction: float, half: bool = False) -> Results:
    """What every contestant should return, in fp64 from the inputs as they are."""
    advantage_T = problem.half_advantage if half else problem.advantage
    selected_T = problem.selected[fraction]
    logprob_T = problem.logprob.clone().requires_grad_()
    loss = policy_loss(logprob_T, problem.old_logprob.double(), advantage_T.double(), selected_T)
    (grad_T,) = torch.autograd.grad(loss, logprob_T)
    dhidden_TD, dweight_VD = gradients(problem.hidden, problem.weight, problem.target, grad_T)
    return {
        "loss": loss.detach(),
        "dhidden": dhidden_TD,
        "dweight": dweight_VD,
        "logprob": problem.logprob,
        "entropy": problem.entropy,
    }


def policy_loss(
    logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, selected_T: Tensor
) -> Tensor:
    """The clipped loss (arXiv 2506.01939v2, equation 6), as a trainer writes it."""
    ratio_T = (logprob_T - old_logprob_T).exp()
    clipped_T = ratio_T.clamp(0.8, 1.28)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    return (loss_T * selected_T).sum() / selected_T.sum()


def step(hidden_TD: Tensor, weight_VD: Tensor, loss: Tensor) -> Results:
    """The loss and its gradients."""
    dhidden_TD, dweight_VD = torch.autograd.grad(loss, [hidden_TD, weight_VD])
    return {"loss": loss.detach(), "dhidden": dhidden_TD, "dweight": dweight_VD}


def plain_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, as the definitions say."""
    logp_TV = (hidden_TD @ weight_VD.T).float().log_softmax(1)
    fixed_TV = logp_TV.detach()
    entropy_T = -(fixed_TV.exp() * fixed_TV).sum(1)
    return logp_TV.gather(1, target_T.unsqueeze(1)).squeeze(1), entropy_T


def dense(head: EagerHead, problem: Problem, *, fraction: float, compiled: bool = False) -> Results:
    """The loss of all tokens, times a mask."""
    inputs = problem.hidden, problem.weight, problem.target, problem.old_logprob, problem.advantage
    objective = _compiler() if compiled else _objective
    loss, found = objective(head, *inputs, problem.selected[fraction])
    return step(problem.hidden, problem.weight, loss) | found


def dense_by_onednn(head: EagerHead, problem: Problem, *, fraction: float) -> Results:
    """The same, with fp32 products by oneDNN; refused where the inputs are not fp32 on a CPU."""
    if problem.hidden.dtype != torch.float32 or problem.hidden.device.type != "cpu":
        raise RefusedError("it is a choice for fp32 on a CPU alone")
    with products_by_onednn():
        return dense(head, problem, fraction=fraction)


def _objective(
    head: EagerHead,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    selected_T: Tensor,
) -> tuple[Tensor, Results]:
    """The loss, and what the head found: a compiler would drop what nobody reads."""
    logprob_T, entropy_T = head(hidden_TD, weight_VD, target_T)
    loss = policy_loss(logprob_T, old_logprob_T, advantage_T, selected_T)
    found = {"logprob": logprob_T.detach()}
    return loss, found if entropy_T is None else found | {"entropy": entropy_T.detach()}


@cache
def _compiler() -> Callable[..., tuple[Tensor, Results]]:
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise RefusedError("TORCHDYNAMO_DISABLE=1 makes torch.compile do nothing")
    return torch.compile(_objective)


@contextmanager
def products_by_onednn() -> Iterator[None]:
    """Inside, torch's fp32 products on a CPU are oneDNN's, on AMD's processors the faster.

    "medium" allows bf16 operands too, which oneDNN takes only where the processor has products of
    them: there the check refuses the results.
    """
    if not torch.backends.mkldnn.is_available():
        raise RefusedError("this torch has no oneDNN")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ours(
    problem: Problem, *, impl: str, fraction: float, known: bool = False, half: bool = False
) -> Results:
    """Our step: `known`, the tokens are told beforehand; `half`, of the advantages are zero."""
    loss, _ = high_entropy_policy_loss(
        Head(problem.hidden, problem.weight, problem.target),
        problem.old_logprob,
        problem.half_advantage if half else problem.advantage,
        problem.mask,
        fraction=fraction,
        selected=problem.selected[fraction] if known else None,
        backend=Backend(impl),
    )
    return step(problem.hidden, problem.weight, loss)


def our_forward(problem: Problem, *, impl: str, statistics: tuple[str, ...] = ()) -> Results:
    """Log-probabilities and entropies of all tokens, and more statistics of them."""
    inputs = problem.hidden, problem.weight, problem.target
    with torch.no_grad():
        found = linear_logprob_entropy(Head(*inputs), statistics=statistics, impl=impl)
    return {"logprob": found.logprob, "entropy": found.entropy}
