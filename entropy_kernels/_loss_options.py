"""Which loss is meant, and what a caller of it can get wrong, said before anything is computed."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    LARGEST,
    check_advantage,
    check_choice,
    check_clip,
    check_count,
    check_finite,
    check_group,
    check_logprobs,
    check_number,
    check_tensor,
    check_values,
    is_number,
    shown,
    warn_once,
)
from .loss_terms import AGGREGATIONS, CORRECTIONS, KL_TYPES
from .losses import (
    LOSSES,
    SEQUENCE_OVER,
    Loss,
    clipped_ratio,
    gspo,
    gspo_token,
    luspo,
    reinforce,
    sapo,
    vespo,
)

ON = ("selected", "all")
OVER = ("all", "selected")
_CHOICES = {
    "sequence_over": (None, *OVER),
    "aggregation": (None, *AGGREGATIONS),
    "correction": (None, *CORRECTIONS),
    "kl_type": KL_TYPES,
    "kl_on": ON,
    "entropy_on": ON,
}
# Options that may be a number or a tensor.
_NUMBERS = ("clip_low", "clip_high", "kl_coef", "denominator", "num_sequences")
# Options that are a tensor, or may be one.
_TENSORS = ("token_weight", "sampler_logprob", "reference_logprob", "entropy", *_NUMBERS)
# Losses whose clips are distances of a ratio from 1.
_OF_RATIOS = (clipped_ratio, gspo, gspo_token, luspo)


def find_loss(loss_type: str | Callable[..., Tensor]) -> tuple[Loss, str, str | None]:
    """The function, its aggregation, and which tokens it sums a sequence over, if it does."""
    if isinstance(loss_type, str):
        if loss_type not in LOSSES:
            names = ", ".join(LOSSES)
            raise ValueError(f"loss_type must be one of {names}, or a function; got {loss_type!r}")
        loss, aggregation = LOSSES[loss_type]
        return loss, aggregation, SEQUENCE_OVER.get(loss)
    if not callable(loss_type):
        raise ValueError(f"loss_type must be a name or a function; got {shown(loss_type)}")
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


def check_options(options: Mapping[str, Any]) -> None:
    """Each option of ratio_loss that is given, by itself."""
    for name, value in options.items():
        if name in _CHOICES:
            check_choice(name, value, _CHOICES[name])
        elif name == "loss_type":
            find_loss(value)
        elif name in ("kl_coef", "entropy_coef"):
            number_only = name == "entropy_coef" or not isinstance(value, Tensor)
            (check_finite if number_only else check_tensor)(name, value)
        elif name == "denominator" and isinstance(value, str):
            if value not in ("selected", "all"):
                raise ValueError(f'{name} must be "selected", "all" or a count; got {value!r}')
        elif name == "denominator":
            check_count(name, value, '"selected", "all" or ')
        elif value is None:
            continue
        elif name in ("clip_low", "clip_high"):
            check_clip(name, value)
        elif name == "dual_clip":
            check_number(name, value, "> 1 or None", lambda x: x > 1)
        elif name == "num_sequences":
            check_count(name, value)
        elif name in ("correction_cap", "correction_floor"):
            check_number(name, value, ">= 0 or None", lambda x: x >= 0)
        elif name == "sequence_group":
            check_group(name, value)
    if "loss_type" in options:
        clips = {name: options.get(name) for name in ("clip_low", "clip_high", "dual_clip")}
        _check_clips(options["loss_type"], clips)


def check_arguments(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    masks: dict[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """What ratio_loss is given, each by itself and then together; `options` are all its own."""
    check_options(options)
    check_tensor("logprob", logprob, "floating-point")
    for name, x in masks.items():
        check_tensor(name, x, "bool", logprob, "logprob")
    for name in ("old_logprob", *_TENSORS):
        _check_like(name, old_logprob if name == "old_logprob" else options[name], logprob)
    check_advantage(advantage, logprob)
    _check_loss(logprob, options)
    _check_aggregation(logprob, options)
    _check_correction(logprob, options)
    _check_terms(options)


def _check_like(name: str, x: Any, logprob: Tensor) -> None:
    """None; one a token; one number, or a tensor of it, where the option allows it."""
    if x is None or (name in _NUMBERS and not isinstance(x, Tensor)):
        return
    if name == "denominator" and isinstance(x, str):
        return
    count = name in ("denominator", "num_sequences")
    weight = name == "token_weight" and isinstance(x, Tensor) and x.dtype == torch.bool
    check_tensor(name, x, "any" if weight or count else "floating-point")
    if count and x.device.type == "cpu":
        return
    if x.device != logprob.device:
        raise ValueError(f"{name} must be on {logprob.device}, like logprob; got {x.device}")
    if not count and not (name in _NUMBERS and x.ndim == 0):
        check_tensor(name, x, "any", logprob, "logprob")


def check_contents(
    seen: Tensor,
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    options: Mapping[str, Any],
) -> None:
    """What can be seen on a CPU: of tensors, what their values at the tokens `seen` cannot be.

    A NaN can, of data: it makes the loss NaN, on every device.
    """
    check_logprobs("logprob", logprob, seen, inf=True)
    check_logprobs("old_logprob", old_logprob, seen)
    check_logprobs("sampler_logprob", options["sampler_logprob"], seen)
    check_logprobs("reference_logprob", options["reference_logprob"], seen)
    check_values("advantage", advantage, "finite", -LARGEST, LARGEST, seen)
    weight = options["token_weight"]
    if weight is not None and weight.dtype != torch.bool:
        check_values("token_weight", weight, ">= 0 and finite", 0, LARGEST, seen)
    for name in ("clip_low", "clip_high"):
        check_values(name, options[name], ">= 0", 0, torch.inf)
    check_values("kl_coef", options["kl_coef"], "finite", -LARGEST, LARGEST, seen)


def beyond_kept(
    on_policy: bool,
    loss_type: str | Callable[..., Tensor] = "dapo",
    sequence_over: str | None = None,
    kl_on: str = "selected",
    entropy_on: str = "selected",
    correction: str | None = None,
    **_: Any,
) -> str | None:
    """The option, if any, that reads log-probs or entropies of tokens that are not kept."""
    if (sequence_over or find_loss(loss_type)[2]) == "all":
        return f'loss_type={loss_type!r} with sequence_over="all"'
    if on_policy and correction is not None and correction.startswith("sequence"):
        return f"correction={correction!r} without old_logprob"
    if kl_on == "all":
        return 'kl_on="all"'
    return 'entropy_on="all"' if entropy_on == "all" else None


def _check_loss(logprob: Tensor, options: Mapping[str, Any]) -> None:
    loss_type, over = options["loss_type"], options["sequence_over"]
    is_over_sequences = find_loss(loss_type)[2] is not None
    if over is not None and isinstance(loss_type, str) and not is_over_sequences:
        raise ValueError(f"sequence_over has no meaning with loss_type={loss_type!r}; got {over!r}")
    if is_over_sequences and logprob.ndim != 2:
        raise ValueError(f"loss_type={loss_type!r} needs [B, L] inputs; got {tuple(logprob.shape)}")


def _clips(loss_type: object) -> tuple[str, ...]:
    """Which of ratio_loss's own options the loss of that name takes."""
    function = LOSSES[loss_type][0] if isinstance(loss_type, str) else None
    if function in (None, sapo, vespo, reinforce):
        return ()
    names = ("clip_low", "clip_high")
    return (*names, "dual_clip") if function is clipped_ratio else names


def _check_clips(loss_type: object, clips: Mapping[str, Any]) -> None:
    """Distances from a ratio of 1: beyond 1 the lower bound is negative, or a bound was given.

    gmpo's clips are of a log-ratio, dppo's of a probability, and cispo's lower one may be any.
    """
    for name, value in clips.items():
        if value is not None and name not in _clips(loss_type):
            raise ValueError(
                f"{name} has no meaning with loss_type={loss_type!r}; a function's own options are "
                f"set by functools.partial; got {name}={value}"
            )
    clip_low, clip_high = clips["clip_low"], clips["clip_high"]
    if not isinstance(loss_type, str) or LOSSES[loss_type][0] not in _OF_RATIOS:
        return
    if is_number(clip_low) and clip_low > 1:
        raise ValueError(
            f"clip_low must lie in [0, 1], a distance below the ratio 1, with "
            f"loss_type={loss_type!r}; got clip_low={clip_low}"
        )
    if is_number(clip_high) and 1 < clip_high < 2:
        warn_once(
            "clip_high",
            f"clip_high={clip_high} is a distance: ratios are clipped at {1 + clip_high:g}; the "
            f"bound {clip_high:g} is clip_high={clip_high - 1:g}"
            + (f", and {clip_low:g} is clip_low={1 - clip_low:g}" if is_number(clip_low) else ""),
        )


def _check_aggregation(logprob: Tensor, options: Mapping[str, Any]) -> None:
    loss_type, denominator = options["loss_type"], options["denominator"]
    aggregation = options["aggregation"] or find_loss(loss_type)[1]
    is_word = isinstance(denominator, str)
    what = f"with loss_type={loss_type!r} and aggregation={aggregation!r}"
    if aggregation == "token-mean" and options["num_sequences"] is not None:
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


def check_counts(group: object, **options: Any) -> None:
    """Something is left to count over `group`."""
    check_group("group", group)
    if group is not None and not counts_left(**options):
        given = {name: options[name] for name in ("denominator", "num_sequences")}
        raise ValueError(
            "group is for counts that are left to the loss; one that is given has to be the mean "
            f"count per rank already (distributed.mean_count), without group; got {given}"
        )


def _check_terms(options: Mapping[str, Any]) -> None:
    kl_coef, entropy_coef = options["kl_coef"], options["entropy_coef"]
    has_kl = isinstance(kl_coef, Tensor) or kl_coef != 0
    if has_kl and options["reference_logprob"] is None:
        raise ValueError(f"kl_coef={kl_coef} needs reference_logprob")
    if entropy_coef != 0 and options["entropy"] is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy")


def _check_correction(logprob: Tensor, options: Mapping[str, Any]) -> None:
    loss_type, correction = options["loss_type"], options["correction"]
    cap, floor = options["correction_cap"], options["correction_floor"]
    if correction is None:
        return
    if options["sampler_logprob"] is None:
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
