"""The entropy bonus of an update: its coefficient, and the loss where it is over all tokens.

T response tokens.
"""

from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.backends import beside_head
from trainer.batch import Batch
from trainer.config import Algorithm


def make_controller(algorithm: Algorithm) -> ek.EntropyController | None:
    """What moves the coefficient; None where it is a constant, or there is none."""
    held = algorithm.entropy_target if algorithm.entropy_band is None else algorithm.entropy_band
    if held is None:
        return None
    return ek.EntropyController(
        held,
        coef=algorithm.entropy_coef,
        delta=algorithm.entropy_delta,
        bounds=algorithm.entropy_bounds,
    )


def make_bonus(batch: Batch, algorithm: Algorithm, coef: float) -> ek.EntropyBonus:
    """The bonus of a batch whose gradient is divided by the count of `algorithm.denominator`.

    Over all tokens, and divided by the selected ones, it is scaled to a mean over all.

    Raises ValueError for a bonus over all tokens where a rule weighs them or cuts responses.
    """
    if not algorithm.has_bonus:
        return ek.EntropyBonus()
    over, share = algorithm.entropy_over, 1.0
    if over == "all" and (batch.weight_T is not None or batch.kept_length_B is not None):
        raise ValueError(
            f'entropy_over="all" has no meaning where the rule weighs tokens or cuts responses, as '
            f'which={algorithm.which!r} does; use entropy_over="selected"'
        )
    if (over, algorithm.denominator, algorithm.loss_type) == ("all", "selected", "dapo"):
        share = float(batch.selected_T.double().mean())
    # A tensor: where it is 0 the entropies are measured too.
    return ek.EntropyBonus(torch.tensor(coef * share, dtype=torch.float64), over)


def sums_of_bonus(metrics: dict[str, Any], algorithm: Algorithm) -> dict[str, Any]:
    """A micro-batch's metrics, with the sum of its entropies in place of their mean."""
    if "entropy/of_bonus" not in metrics:
        return metrics
    metrics = {
        k: x for k, x in metrics.items() if k not in ("entropy/bonus", "entropy/coefficient")
    }
    mean = metrics.pop("entropy/of_bonus")
    return metrics | {"sum/entropy": mean.double() * metrics[f"tokens/{algorithm.entropy_over}"]}


def metrics_of_bonus(total: float, tokens: int, coef: float) -> dict[str, float]:
    """The bonus of a whole batch whose `tokens` have entropies of this `total`, nats."""
    mean = total / max(tokens, 1)
    return {
        "entropy/of_bonus": mean,
        "entropy/bonus": coef * mean,
        "entropy/coefficient": coef,
    }


def loss_on_all(
    head: ek.Head, part: Batch, impl: str, main_grad: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on the selected tokens, with a bonus on all: the head runs on every row."""
    found = ek.linear_logprob_entropy(
        head, support=part.rollouts.kept, main_grad=main_grad, impl=impl
    )
    loss, metrics = ek.ratio_loss(
        found.logprob,
        part.old_logprob_T,
        part.advantage_B,
        torch.ones_like(part.selected_T),
        selected=part.selected_T,
        entropy=found.entropy,
        impl=beside_head(impl),
        **options,
    )
    selected = torch.where(part.selected_T, found.entropy.detach(), 0.0).sum()
    mean = selected / part.selected_T.sum().clamp_min(1)
    return loss, metrics | {"entropy/selected_mean": mean}
