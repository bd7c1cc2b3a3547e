"""Which loss is meant, and what a caller of it can get wrong, said before anything is computed."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .loss_terms import CORRECTIONS, KL_TYPES
from .losses import (
    AGGREGATIONS,
    LOSSES,
    SEQUENCE_OVER,
    Loss,
    clipped_ratio,
    reinforce,
    sapo,
    vespo,
)

ON = ("kept", "all")
OVER = ("all", "selected")


def find_loss(loss_type: str | Callable[..., Tensor]) -> tuple[Loss, str, str | None]:
    """The function, its aggregation, and which tokens it sums a sequence over, if it does."""
    if isinstance(loss_type, str):
        if loss_type not in LOSSES:
            names = ", ".join(LOSSES)
            raise ValueError(f"loss_type must be one of {names}, or a function; got {loss_type!r}")
        loss, aggregation = LOSSES[loss_type]
        return loss, aggregation, SEQUENCE_OVER.get(loss)
    if not callable(loss_type):
        raise ValueError(f"loss_type must be a name or a function; got {loss_type!r}")
    base = _base(loss_type)
    for loss, aggregation in LOSSES.values():
        if loss is base:
            return loss_type, aggregation, SEQUENCE_OVER.get(loss)
    return loss_type, "token-mean", None


def _base(loss: Loss) -> Loss:
    return loss.func if isinstance(loss, functools.partial) else loss


def sees_sequences(loss_type: str | Callable[..., Tensor]) -> bool:
    """Whether a loss needs to know the ranks that share its sequences: ours that sum over them.

    What a function of the caller's does is unknown: it has to take `sequence_group`.
    """
    loss, _, over = find_loss(loss_type)
    if _base(loss) in {function for function, _ in LOSSES.values()}:
        return over is not None
    if "sequence_group" not in inspect.signature(loss).parameters:
        raise ValueError(
            "with sequence_group, a loss_type of your own must take it as a keyword, to sum over "
            f"sequences as a whole; got {loss_type!r}"
        )
    return True


def check_tensors(logprob: Tensor, masks: dict[str, Tensor], **like: Any) -> None:
    """`like` may hold None, and numbers where a number would do."""
    tensors = {name: x for name, x in like.items() if isinstance(x, Tensor)}
    for name, x in (tensors | masks).items():
        if x.device != logprob.device:
            raise ValueError(f"{name} must be on {logprob.device}, like logprob; got {x.device}")
        scalar = name in ("clip_low", "clip_high", "kl_coef") and x.ndim == 0
        if x.shape != logprob.shape and not scalar:
            raise ValueError(
                f"{name} must have logprob's shape {tuple(logprob.shape)}; got {tuple(x.shape)}"
            )
    for name, x in masks.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor; got {x.dtype}")


def check_loss(
    logprob: Tensor,
    loss_type: object,
    over: str | None,
    is_over_sequences: bool,
    clip: Mapping[str, Any],
) -> None:
    for name, value in clip.items():
        if value is not None and name not in _clips(loss_type):
            raise ValueError(
                f"{name} has no meaning with loss_type={loss_type!r}; a function's own options are "
                f"set by functools.partial; got {name}={value}"
            )
    _check_choice("sequence_over", over, (None, *OVER))
    if over is not None and isinstance(loss_type, str) and not is_over_sequences:
        raise ValueError(f"sequence_over has no meaning with loss_type={loss_type!r}; got {over!r}")
    if is_over_sequences and logprob.ndim != 2:
        raise ValueError(f"loss_type={loss_type!r} needs [B, L] inputs; got {tuple(logprob.shape)}")
    _check_clip(most=1 if "dual_clip" in _clips(loss_type) else torch.inf, **clip)


def _clips(loss_type: object) -> tuple[str, ...]:
    """Which of ratio_loss's own options the loss of that name takes."""
    function = LOSSES[loss_type][0] if isinstance(loss_type, str) else None
    if function in (None, sapo, vespo, reinforce):
        return ()
    names = ("clip_low", "clip_high")
    return (*names, "dual_clip") if function is clipped_ratio else names


def _check_clip(most: float, clip_low: Any, clip_high: Any, dual_clip: float | None) -> None:
    low = clip_low if isinstance(clip_low, int | float) else 0
    high = clip_high if isinstance(clip_high, int | float) else 0
    if not 0 <= low <= most or not high >= 0:
        raise ValueError(
            f"clip_low must lie in [0, {most}] and clip_high be >= 0; "
            f"got clip_low={clip_low}, clip_high={clip_high}"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None; got {dual_clip}")


def check_aggregation(
    logprob: Tensor,
    loss_type: object,
    aggregation: str,
    denominator: str | float | Tensor,
    num_sequences: float | Tensor | None,
) -> None:
    _check_choice("aggregation", aggregation, AGGREGATIONS)
    is_word = isinstance(denominator, str)
    if is_word and denominator not in ("selected", "all"):
        raise ValueError(f'denominator must be "selected", "all" or a count; got {denominator!r}')
    for name, count in {"denominator": denominator, "num_sequences": num_sequences}.items():
        if isinstance(count, int | float) and not count > 0:
            raise ValueError(f"{name} must be > 0; got {count}")
    what = f"with loss_type={loss_type!r} and aggregation={aggregation!r}"
    if aggregation == "token-mean" and num_sequences is not None:
        raise ValueError(f"num_sequences has a meaning with the seq-mean aggregations only, {what}")
    if aggregation != "token-mean" and logprob.ndim != 2:
        raise ValueError(f"{what}, [B, L] inputs are needed; got {tuple(logprob.shape)}")
    if aggregation == "seq-mean-token-mean" and not is_word:
        raise ValueError(
            f'{what}, denominator must be "selected" or "all", each sequence has its own count '
            f"(num_sequences takes the step's); got {denominator!r}"
        )
    if aggregation == "seq-mean-token-sum" and not (is_word and denominator == "selected"):
        raise ValueError(f"{what}, tokens have no denominator; got {denominator!r}")
    if aggregation == "seq-mean-token-sum-norm" and is_word:
        raise ValueError(
            f"{what}, denominator must be a number, the constant length that a sequence's sum is "
            f"divided by (Dr. GRPO: the longest response allowed); got {denominator!r}"
        )
    if loss_type == "bnpo" and aggregation == "token-mean" and not is_word:
        raise ValueError(
            'loss_type="bnpo" divides by this batch\'s own count; that of a step is "dapo"\'s; '
            f"got denominator={denominator!r}"
        )


def counts_left(
    loss_type: str | Callable[..., Tensor] = "dapo",
    aggregation: str | None = None,
    denominator: str | float | Tensor = "selected",
    num_sequences: float | Tensor | None = None,
    **_: Any,
) -> bool:
    """Whether options of `ratio_loss` leave it tokens or sequences to count."""
    if (aggregation or find_loss(loss_type)[1]) == "token-mean":
        return isinstance(denominator, str)
    return num_sequences is None


def check_group(group: object, **options: Any) -> None:
    if group is not None and not counts_left(**options):
        given = {name: options[name] for name in ("denominator", "num_sequences")}
        raise ValueError(
            "group is for counts that are left to the loss; one that is given has to be the mean "
            f"count per rank already (distributed.mean_count), without group; got {given}"
        )


def check_terms(
    reference_logprob: Tensor | None,
    kl_coef: float | Tensor,
    kl_type: str,
    kl_on: str,
    entropy: Tensor | None,
    entropy_coef: float,
    entropy_on: str,
) -> None:
    _check_choice("kl_type", kl_type, KL_TYPES)
    _check_choice("kl_on", kl_on, ON)
    _check_choice("entropy_on", entropy_on, ON)
    has_kl = isinstance(kl_coef, Tensor) or kl_coef != 0
    if has_kl and reference_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logprob")
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy")


def check_correction(
    logprob: Tensor,
    loss_type: object,
    sampler_logprob: Tensor | None,
    correction: str | None,
    cap: float | None,
    floor: float | None,
) -> None:
    _check_choice("correction", correction, (None, *CORRECTIONS))
    if correction is None:
        return
    if sampler_logprob is None:
        raise ValueError(f"correction={correction!r} needs sampler_logprob")
    if loss_type == "vespo":
        raise ValueError(
            'loss_type="vespo" has a weight of its own for the whole mismatch: give '
            f"sampler_logprob as old_logprob; got correction={correction!r}"
        )
    if not 0 <= (0 if floor is None else floor) <= (torch.inf if cap is None else cap):
        raise ValueError(
            f"0 <= correction_floor <= correction_cap is wanted; got {floor} and {cap}"
        )
    if correction.startswith("sequence") and logprob.ndim != 2:
        raise ValueError(
            f"correction={correction!r} needs [B, L] inputs; got {tuple(logprob.shape)}"
        )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        wanted = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {wanted}; got {value!r}")
