"""One policy-gradient step through the LM head on a GPU: its inputs, and the truth in fp64.

T tokens, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._bench.step import (
    SEQUENCES,
    gradients,
    peaked_head,
    policy_loss,
    statistics,
)

FRACTION = 0.2


class Problem(NamedTuple):
    """A step's inputs, and what every contestant should return for them."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    old_logprob: Tensor  # fp32 [T]
    advantage: Tensor  # fp32 [T], one value per sequence
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
    """Entropies of a reasoning model, ratios a few per cent off 1, one advantage per sequence."""
    hidden_TD, weight_VD, target_T = peaked_head(tokens, hidden, vocabulary, dtype, device, seed)
    logprob_T, entropy_T = statistics(hidden_TD, weight_VD, target_T)
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


def _gradients(problem: Problem) -> dict[str, Tensor]:
    """The loss, and its gradients from fp64 sums, kept in fp32 to leave room for contestants."""
    logprob_T = problem.truth["logprob"].clone().requires_grad_()
    loss = policy_loss(
        logprob_T, problem.old_logprob.double(), problem.advantage.double(), problem.selected
    )
    (grad_T,) = torch.autograd.grad(loss, logprob_T)
    dhidden_TD, dweight_VD = gradients(problem.hidden, problem.weight, problem.target, grad_T)
    return {"loss": loss.detach(), "dhidden": dhidden_TD.float(), "dweight": dweight_VD.float()}
