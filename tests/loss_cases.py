"""Batches on which every loss clips somewhere and does not elsewhere."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.verification import truth

B, L = 6, 9


class Case(NamedTuple):
    """fp64; advantage_B is per sequence, and `selected` a subset of the mask."""

    logprob: Tensor
    old: Tensor
    advantage: Tensor
    advantage_B: Tensor
    mask: Tensor
    selected: Tensor

    def loss(self, logprob: Tensor, **options: Any) -> Tensor:
        """The loss of other log-probs."""
        return self._replace(logprob=logprob).both(**options)[0]

    def both(self, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`ratio_loss` of the selected tokens; `options` may replace old_logprob and selected."""
        given = {"old_logprob": self.old, "selected": self.selected} | options
        return ratio_loss(logprob=self.logprob, advantage=self.advantage, mask=self.mask, **given)


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


# Where each option of a flat table belongs: its group, and its name there.
PLACES = {
    "kl_coef": (ek.KL, "coef"),
    "kl_type": (ek.KL, "type"),
    "kl_on": (ek.KL, "on"),
    "reference_logprob": (ek.KL, "reference_logprob"),
    "entropy_coef": (ek.EntropyBonus, "coef"),
    "entropy_on": (ek.EntropyBonus, "on"),
    "correction": (ek.Correction, "type"),
    "correction_cap": (ek.Correction, "cap"),
    "correction_floor": (ek.Correction, "floor"),
    "sampler_logprob": (ek.Correction, "sampler_logprob"),
    "correction_of": (ek.Correction, "of"),
    "aggregation": (ek.Aggregation, "type"),
    **{name: (ek.Aggregation, name) for name in ("num_sequences", "sequence_over")},
    "token_weight": (ek.Aggregation, "token_weight"),
    **{name: (ek.Parallel, name) for name in ("group", "sequence_group", "vocab_group")},
    **{name: (ek.Selection, name) for name in ("which", "scope", "threshold_tolerance")},
    **{name: (ek.Backend, name) for name in ("main_grad", "max_active_rows")},
}
NAMES = {
    ek.KL: "kl",
    ek.EntropyBonus: "entropy_bonus",
    ek.Correction: "correction",
    ek.Aggregation: "aggregation",
    ek.Parallel: "parallel",
    ek.Selection: "selection",
    ek.Backend: "backend",
}


def grouped(options: Mapping[str, Any], head: bool = False) -> dict[str, Any]:
    """The options of a flat table in their groups; `head`: of the head's loss, impl too."""
    places = PLACES | ({"impl": (ek.Backend, "impl")} if head else {})
    groups: dict[type, dict[str, Any]] = {}
    for name, value in options.items():
        if name in places:
            groups.setdefault(places[name][0], {})[places[name][1]] = value
    found = {NAMES[kind]: kind(**values) for kind, values in groups.items()}
    return found | {name: value for name, value in options.items() if name not in places}


def ratio_loss(*tensors: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`ek.ratio_loss` with a flat table of options."""
    return ek.ratio_loss(*tensors, **grouped(options))


FIELDS_OF_HEAD = {field.name for field in dataclasses.fields(ek.Head)}


def policy_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, *tensors: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ek.high_entropy_policy_loss` with a flat table of options, those of the head among them."""
    own = {name: options.pop(name) for name in list(options) if name in FIELDS_OF_HEAD}
    head = ek.Head(hidden, weight, target, **own)
    return ek.high_entropy_policy_loss(head, *tensors, **grouped(options, head=True))


def gradient(logprob: Tensor, loss_of) -> tuple[Tensor, Tensor]:
    """The loss of a leaf, and its gradient."""
    x = logprob.clone().requires_grad_()
    loss = loss_of(x)
    loss.backward()
    return loss.detach(), x.grad


def worst_of_shuffles(loss_of, logprob: Tensor, others, truths) -> list[Tensor]:
    """The loss and its gradient [B, L], each element from the worst of several orders of tokens.

    loss_of: of log-probs and `others`, [B, L] or None.
    """

    def both(x, *rest):
        return gradient(x, lambda x: loss_of(x, *rest))

    return truth.worst_of_shuffles(both, logprob, others, truths)
