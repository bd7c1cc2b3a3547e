"""Batches on which every loss clips somewhere and does not elsewhere."""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels.testing import worst_elements

B, L = 6, 9


class Case(NamedTuple):
    """fp64; advantage_B is one a sequence, and `selected` a subset of the mask."""

    logprob: Tensor
    old: Tensor
    advantage: Tensor
    advantage_B: Tensor
    mask: Tensor
    selected: Tensor


def make_case(seed: int = 0, empty: bool = True) -> Case:
    """Ragged sequences, the last one empty; ratios near to one in the first two, and far."""
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(B, L, generator=g, dtype=torch.float64) * 3 - 0.5
    move = torch.randn(B, L, generator=g, dtype=torch.float64) * 0.6
    lengths = torch.tensor([9, 7, 8, 4, 2, 0 if empty else 1])
    mask = torch.arange(L) < lengths[:, None]
    # Sequences whose mean log-ratio lies inside of GSPO's and LUSPO's clips.
    for b, mean in ((0, 1e-4), (1, -1e-4), (2, 1.5e-3)):
        move[b] = move[b] * 0.3
        move[b] -= move[b][mask[b]].mean() - mean
    # A probability that moves by more than DPPO's thresholds, both ways.
    logprob[3, 0], move[3, 0] = -0.02, 1.5
    logprob[4, 0], move[4, 0] = -2.5, -2.4
    advantage_B = torch.tensor([1.0, -0.7, 0.5, 1.3, -1.1, 0.4], dtype=torch.float64)
    advantage = advantage_B[:, None] * (0.5 + torch.rand(B, L, generator=g, dtype=torch.float64))
    advantage[0, 2] = 0.0
    selected = torch.rand(B, L, generator=g) < 0.6
    selected[3, 0] = selected[4, 0] = True
    return Case(logprob, logprob - move, advantage, advantage_B, mask, selected)


def gradient(logprob: Tensor, loss_of) -> tuple[Tensor, Tensor]:
    """The loss of a leaf, and its gradient."""
    x = logprob.clone().requires_grad_()
    loss = loss_of(x)
    loss.backward()
    return loss.detach(), x.grad


def worst_of_shuffles(loss_of, logprob: Tensor, others, truths, orders: int = 16) -> list[Tensor]:
    """The loss and its gradient [B, L], each element from the worst of several orders of tokens.

    loss_of: of log-probs and `others`, [B, L] or None. The terms of a loss cancel, so that its
    error in one order may be anything down to none.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(orders):
        rows, columns = (torch.randperm(n, generator=generator) for n in logprob.shape)
        x, *rest = (None if x is None else x[rows][:, columns] for x in (logprob, *others))
        loss, mixed = gradient(x, lambda x, rest=rest: loss_of(x, *rest))
        slope = torch.empty_like(mixed)
        slope[rows[:, None], columns] = mixed
        found.append([loss, slope])
    return worst_elements(found, truths)
