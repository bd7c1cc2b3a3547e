"""What every backend of linear_logprob_entropy shares: its results, and the rows worth a backward.

T tokens, R active rows, V vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# What forward adds on request, rows of a fp32 [4, T]: variance of log p, the largest p, and the
# sums of p^2 and of p^2 log p.
STATISTICS = ("varentropy", "max_prob", "sum_p2", "sum_p2_logp")


class ForwardRows(NamedTuple):
    """What forward knows of each row, all fp32 [T]; and h W^T + b, or empty if not kept.

    Kept logits are [T, V], or in an order of their own, known to the backend that keeps them. Where
    those of some rows are kept, `places`, int32 [T], is the row of the logits that each token's
    are, -1 where they are not kept.

    Backward takes the log-sum-exp as two floats, (max, log_sum): at |z| = 6e3 their rounded sum
    alone would cost the gradient 25 times its error.
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    max: Tensor
    log_sum: Tensor
    logits: Tensor
    places: Tensor | None = None


def active_rows(gradients: Iterable[Tensor | None], target_T: Tensor, ignore_index: int) -> Tensor:
    """Numbers [R] of the rows at which any gradient is not exactly zero; a NaN is not.

    On CUDA their count reaches the host: one synchronisation.
    """
    active_T = torch.zeros_like(target_T, dtype=torch.bool)
    for grad_T in gradients:
        if grad_T is not None:
            active_T |= grad_T != 0
    return (active_T & (target_T != ignore_index)).nonzero().squeeze(1)


def per_row(temperature: Tensor | None, target_T: Tensor) -> Tensor | None:
    """The temperature of every row, fp32; None stands for 1."""
    return None if temperature is None else temperature.float().expand(target_T.shape)


def spread(rows_RD: Tensor, index_R: Tensor, like_TD: Tensor) -> Tensor:
    """Zeros like `like_TD`, contiguous, but for the rows at `index_R`."""
    out_TD = torch.zeros_like(like_TD, memory_format=torch.contiguous_format)
    return out_TD.index_copy_(0, index_R, rows_RD.to(like_TD.dtype))


def sees_values(device: torch.device) -> bool:
    """Whether a wrong value is a ValueError: where the host would wait for it, it becomes NaN."""
    return device.type == "cpu"


def check_values(
    target: Tensor, temperature: Tensor | None, vocabulary: int, ignore_index: int
) -> None:
    """The checks that read values: ValueErrors on a CPU; on CUDA such rows become NaN instead."""
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target must lie in [0, {vocabulary}) or be ignore_index={ignore_index}; "
            f"got {int(target[row])} at row {row}"
        )
    if temperature is not None and not ((temperature > 0) & (temperature < torch.inf)).all():
        wrong = temperature[~((temperature > 0) & (temperature < torch.inf))]
        raise ValueError(f"temperature must be finite and > 0; got {float(wrong[0])}")


def check_active_rows(
    gradients: tuple[Tensor | None, ...], target: Tensor, ignore_index: int, most: int
) -> None:
    """On a CPU, and where rows are counted on the host anyway."""
    count = active_rows(gradients, target, ignore_index).numel()
    if count > most:
        raise ValueError(f"max_active_rows is {most}; got gradients at {count} rows")
