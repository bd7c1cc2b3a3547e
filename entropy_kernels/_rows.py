"""What the backends of the head share: what forward returns, and the rows that need a backward.

T tokens, R active rows, V vocabulary.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import shown
from .head import Head

# The statistics that forward adds on request, the rows of a fp32 [S, T]: variance of log p, the
# largest p, the sums of p^2 and of p^2 log p, the mean logit, and 1 where the target is the first
# of the largest logits, else 0. A row without an answer is NaN in all of them.
STATISTICS = ("varentropy", "max_prob", "sum_p2", "sum_p2_logp", "mean_logit", "is_top1")
# Those that have a meaning over sets of ids: a set of one forms no logit.
OF_SETS = tuple(name for name in STATISTICS if name != "mean_logit")
# S of each backend: it fills so many rows, the first of STATISTICS, and refuses the other names.
FILLED = {"reference": 6, "torch": 6, "cpu": 6, "triton": 6, "cuda": 6, "vocab_group": 6}
# The kernels of csrc/cuda fill so many; with impl="cuda", Triton's fill all where more are wanted.
FILLED_BY_CSRC_CUDA = 4


class ForwardRows(NamedTuple):
    """What forward computes of each row, fp32 [T], and the logits that it stores.

    `logits` is empty where none are stored. All rows' are [T, V], or in an order that the backend
    alone knows, with bias or without. Where some rows' are stored, `places`, int32 [T], gives each
    token's row of `logits`, and -1 where it has none.

    Backward takes the log-sum-exp as two floats, (max, log_sum). Their rounded sum alone would
    give the gradient 25 times its error at |z| = 6e3.
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    max: Tensor
    log_sum: Tensor
    logits: Tensor
    places: Tensor | None = None

    @classmethod
    def for_backward(
        cls,
        entropy: Tensor,
        max: Tensor,
        log_sum: Tensor,
        logits: Tensor,
        places: Tensor | None = None,
    ) -> "ForwardRows":
        """The part that backward reads; entropy stands in the other fields."""
        return cls(entropy, entropy, entropy, max, log_sum, logits, places)


def filled(backend: str) -> tuple[str, ...]:
    """The statistics that a backend computes."""
    return STATISTICS[: FILLED[backend]]


def wanted(names: Collection[str]) -> int:
    """How many rows, from the first on, hold these statistics."""
    return max([0, *(STATISTICS.index(name) + 1 for name in names)])


def statistics_shape(backend: str, wanted: int, tokens: int) -> tuple[int, ...]:
    """(S, T) of what a backend fills where the first `wanted` are asked for; (0,) for none."""
    by_csrc_cuda = backend == "cuda" and wanted <= FILLED_BY_CSRC_CUDA
    rows = FILLED_BY_CSRC_CUDA if by_csrc_cuda else FILLED[backend]
    return (rows, tokens) if wanted else (0,)


def check_statistics(names: Collection[str], backend: str | None = None) -> None:
    """A collection of names out of STATISTICS, no bare name, that the backend (if known) fills."""
    several = isinstance(names, Collection) and not isinstance(names, (str, Tensor))
    if not several or not all(isinstance(name, str) and name in STATISTICS for name in names):
        known = ", ".join(STATISTICS)
        got = repr(names) if several else shown(names)
        raise ValueError(f"statistics must be a collection of names out of {known}; got {got}")
    if backend is not None and (missing := set(names) - set(filled(backend))):
        others = {name: filled(name) for name in FILLED if name != "vocab_group"}
        fuller = " or ".join(f'impl="{name}"' for name in others if missing <= set(others[name]))
        where = backend if backend == "vocab_group" else f'impl="{backend}"'
        raise ValueError(
            f"with {where}, statistics must be out of {', '.join(filled(backend))}; got "
            f"{', '.join(sorted(missing))}, which {fuller or 'no backend'} computes"
        )


def active_rows(gradients: Iterable[Tensor | None], target_T: Tensor, ignore_index: int) -> Tensor:
    """Numbers [R] of the rows where any gradient is not exactly zero, as a NaN is not.

    On CUDA the host waits for their count: one synchronisation.
    """
    return is_active(gradients, target_T, ignore_index).nonzero().squeeze(1)


def is_active(gradients: Iterable[Tensor | None], target_T: Tensor, ignore_index: int) -> Tensor:
    """Which rows those are, bool [T]."""
    active_T = torch.zeros_like(target_T, dtype=torch.bool)
    for grad_T in gradients:
        if grad_T is not None:
            active_T |= grad_T != 0
    return active_T & (target_T != ignore_index)


def numbers(active_T: Tensor, most: int | None) -> tuple[Tensor, Tensor | None]:
    """Numbers [R] of the active rows; with a bound `most` of them, which the host knows, or 1.

    Then places may be left over: their number is 0, and the second, bool [R], is false there.
    """
    if most is None:
        return active_T.nonzero().squeeze(1), None
    room = min(max(most, 1), active_T.numel())
    index_R = torch.nonzero_static(active_T, size=room).squeeze(1)
    return index_R.clamp_min(0), index_R >= 0


def beyond(active_T: Tensor, most: int | None) -> Tensor | None:
    """With a bound for the active rows, a factor of their gradients: NaN beyond it."""
    if most is None:
        return None
    count = active_T.sum()
    if not sees_values(active_T.device):
        return torch.where(count <= most, 1.0, torch.nan)
    if int(count) > most:
        raise ValueError(f"max_active_rows is {most}; got gradients at {int(count)} rows")
    return None


def spread(rows_RD: Tensor, index_R: Tensor, like_TD: Tensor) -> Tensor:
    """`rows_RD` at the rows `index_R` of a contiguous tensor like `like_TD`, zero elsewhere."""
    out_TD = torch.zeros_like(like_TD, memory_format=torch.contiguous_format)
    return out_TD.index_copy_(0, index_R, rows_RD.to(like_TD.dtype))


def sees_values(device: torch.device) -> bool:
    """Whether a wrong value is a ValueError; where the host would have to wait, it becomes NaN."""
    return device.type == "cpu"


def check_values(head: Head, vocabulary: int) -> None:
    """The checks that read the values of a flat head's targets and temperatures."""
    target, temperature = head.target, head.temperature
    wrong = ((target < 0) | (target >= vocabulary)) & head.valid
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target must lie in [0, {vocabulary}) or be ignore_index={head.ignore_index}; "
            f"got {int(target[row])} at row {row}"
        )
    if isinstance(temperature, Tensor):
        wrong = ~((temperature > 0) & (temperature < torch.inf))
        if wrong.any():
            got = float(temperature[wrong][0])
            raise ValueError(f"temperature must be finite and > 0; got {got}")


def check_active_rows(gradients: Iterable[Tensor | None], head: Head, most: int) -> None:
    """For backends whose backward counts the rows on the host."""
    count = active_rows(gradients, head.target, head.ignore_index).numel()
    if count > most:
        raise ValueError(f"max_active_rows is {most}; got gradients at {count} rows")
