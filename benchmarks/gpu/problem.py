"""One policy-gradient step through the LM head on a GPU: its inputs, and the truth in fp64.

T tokens, D hidden, V vocabulary, R rows of a block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.linear_logprob_entropy import policy_loss
from benchmarks.peers import SEQUENCES
from entropy_kernels import testing

FRACTION = 0.2
ROWS = 512


class Problem(NamedTuple):
    """A step's inputs, and what every contestant should return for them."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    old_logprob: Tensor  # fp32 [T]
    advantage: Tensor  # fp32 [T], one value a sequence
    mask: Tensor  # [T], all true
    selected: Tensor  # [T]: the FRACTION of highest entropy
    threshold: Tensor  # fp32 []: between the lowest entropy among them and the next
    truth: dict[str, Tensor]


def make_problem(
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Problem:
    """Entropies of a reasoning model, ratios a few per cent off 1, one advantage a sequence."""
    hidden_TD, weight_VD, target_T = peaked_head(tokens, hidden, vocabulary, dtype, device, seed)
    logprob_T, entropy_T = _statistics(hidden_TD, weight_VD, target_T)
    generator = torch.Generator(device).manual_seed(seed + 1)
    noise_T = torch.randn(tokens, device=device, generator=generator)
    advantage_B = torch.randn(SEQUENCES, device=device, generator=generator)
    sequence_T = torch.arange(tokens, device=device) * SEQUENCES // tokens
    selected_T = ek.top_entropy_mask(entropy_T.float(), fraction=FRACTION)
    problem = Problem(
        hidden_TD.requires_grad_(),
        weight_VD.requires_grad_(),
        target_T,
        logprob_T.float() + 0.02 * noise_T,
        advantage_B[sequence_T],
        torch.ones(tokens, dtype=torch.bool, device=device),
        selected_T,
        _between(entropy_T, selected_T),
        {"logprob": logprob_T, "entropy": entropy_T},
    )
    problem.truth.update(_gradients(problem))
    return problem


def _between(entropy_T: Tensor, selected_T: Tensor) -> Tensor:
    """A threshold that no rounding of an entropy crosses."""
    return ((entropy_T[selected_T].min() + entropy_T[~selected_T].max()) / 2).float()


def peaked_head(
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`entropy_kernels.testing.peaked_head`, drawn on the device and in larger blocks."""
    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"device": device, "generator": generator}
    weight_VD = torch.randn(vocabulary, hidden, **on).div_(hidden**0.5)
    candidates = torch.randint(vocabulary, (tokens, min(6, vocabulary)), **on)
    gaps = (0.3 + torch.rand(candidates.shape, **on)).cumsum(1)
    wanted_T = testing._entropy_quantiles(tokens).to(device)
    wanted_T = wanted_T[torch.randperm(tokens, **on)]
    wanted_T = wanted_T.clamp_max(0.9 * torch.tensor(float(vocabulary)).log().item())

    hidden_TD = torch.empty(tokens, hidden, device=device)
    target_T = torch.empty(tokens, dtype=torch.int64, device=device)
    for start in range(0, tokens, ROWS):
        rows = slice(start, start + ROWS)
        words = weight_VD[candidates[rows]]
        direction = torch.einsum("tc,tcd->td", (-gaps[rows]).exp(), words)
        direction += 0.01 * torch.randn(direction.shape, **on)
        z_RV = direction @ weight_VD.T
        scale = testing._scale_to_entropy(z_RV, wanted_T[rows])
        hidden_TD[rows] = direction * scale
        p_RV = z_RV.mul_(scale).softmax(1)
        target_T[rows] = torch.multinomial(p_RV, 1, generator=generator).squeeze(1)
    return hidden_TD.to(dtype), weight_VD.to(dtype), target_T


def _statistics(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities and entropies [T]."""
    weight = weight_VD.double()
    found = []
    for hidden, target in zip(hidden_TD.split(ROWS), target_T.split(ROWS), strict=True):
        logp_RV = (hidden.double() @ weight.T).log_softmax(1)
        logprob = logp_RV.gather(1, target.unsqueeze(1)).squeeze(1)
        found.append((logprob, torch.special.entr(logp_RV.exp_()).sum(1)))
    return torch.cat([x[0] for x in found]), torch.cat([x[1] for x in found])


def _gradients(problem: Problem) -> dict[str, Tensor]:
    """The loss, and its gradients from fp64 sums, kept in fp32 to leave room for contestants."""
    logprob_T = problem.truth["logprob"].clone().requires_grad_()
    loss = policy_loss(
        logprob_T, problem.old_logprob.double(), problem.advantage.double(), problem.selected
    )
    (grad_T,) = torch.autograd.grad(loss, logprob_T)
    weight_VD = problem.weight.detach().double()
    dhidden_TD = torch.zeros(problem.hidden.shape, device=grad_T.device)
    dweight_VD = torch.zeros_like(weight_VD)
    for rows_R in grad_T.nonzero().squeeze(1).split(ROWS):
        hidden_RD = problem.hidden.detach()[rows_R].double()
        dz_RV = (hidden_RD @ weight_VD.T).softmax(1).neg_()
        dz_RV[torch.arange(len(rows_R), device=grad_T.device), problem.target[rows_R]] += 1
        dz_RV *= grad_T[rows_R].unsqueeze(1)
        dhidden_TD[rows_R] = (dz_RV @ weight_VD).float()
        dweight_VD.addmm_(dz_RV.T, hidden_RD)
    return {"loss": loss.detach(), "dhidden": dhidden_TD, "dweight": dweight_VD.float()}
