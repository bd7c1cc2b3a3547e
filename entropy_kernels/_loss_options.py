"""Which loss is meant, and which of its options make sense together, said before it is computed."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._arguments import check_clip, check_count, check_number, is_number, shown, warn_once
from .losses import (
    LOSSES,
    SEQUENCE_OVER,
    Loss,
    clipped_ratio,
    gspo,
    gspo_token,
    luspo,
)
from .options import KL, Aggregation, Correction, EntropyBonus, Parallel

# Losses whose clips are distances of a ratio from 1.
_OF_RATIOS = (clipped_ratio, gspo, gspo_token, luspo)
_OURS = {function for function, _ in LOSSES.values()}
_CLIPS = {
    name: {"clip_low", "clip_high", "dual_clip"} & inspect.signature(function).parameters.keys()
    for name, (function, _) in LOSSES.items()
}


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


@dataclass(frozen=True, eq=False)
class LossOptions:
    """The options of a loss, checked each by itself and together, but for shapes of tensors."""

    loss_type: str | Callable[..., Tensor]
    clip_low: float | Tensor | None
    clip_high: float | Tensor | None
    dual_clip: float | None
    denominator: str | float | Tensor
    aggregation: Aggregation
    kl: KL
    correction: Correction
    entropy_bonus: EntropyBonus
    parallel: Parallel

    def __post_init__(self) -> None:
        check_kinds(
            aggregation=(self.aggregation, Aggregation),
            kl=(self.kl, KL),
            correction=(self.correction, Correction),
            entropy_bonus=(self.entropy_bonus, EntropyBonus),
            parallel=(self.parallel, Parallel),
        )
        find_loss(self.loss_type)
        _check_denominator(self.denominator)
        _check_clips(self)

    @property
    def aggregation_type(self) -> str:
        """The one that was asked for, or the loss's own."""
        return self.aggregation.type or find_loss(self.loss_type)[1]

    @property
    def sequence_over(self) -> str | None:
        """As `Aggregation.sequence_over`, or the loss's own; None for a loss of single tokens."""
        return self.aggregation.sequence_over or find_loss(self.loss_type)[2]

    @property
    def has_kernel(self) -> bool:
        """Whether it is the fused kernel's loss: the clipped ratio with clips that are numbers."""
        named = isinstance(self.loss_type, str) and find_loss(self.loss_type)[0] is clipped_ratio
        return named and not any(isinstance(x, Tensor) for x in (self.clip_low, self.clip_high))

    @property
    def counts_left(self) -> bool:
        """Whether the loss has tokens or sequences to count."""
        if self.aggregation_type == "token-mean":
            return isinstance(self.denominator, str)
        return self.aggregation.num_sequences is None

    @property
    def of_sequences(self) -> str | None:
        """The option, if any, that needs tokens as [B, L]."""
        if find_loss(self.loss_type)[2] is not None:
            return f"loss_type={self.loss_type!r}"
        if self.aggregation_type != "token-mean":
            return f"aggregation {self.aggregation_type!r} of loss_type={self.loss_type!r}"
        kind = self.correction.type
        return f"Correction.type={kind!r}" if kind and kind.startswith("sequence") else None

    @property
    def own_function(self) -> bool:
        """Whether the loss is a function of the caller's: unknown is whether it sums sequences."""
        return _base(find_loss(self.loss_type)[0]) not in _OURS

    def function(self, clip_low: float | Tensor | None, clip_high: float | Tensor | None) -> Loss:
        """The loss with these clips and, where it sums sequences, the ranks that share them."""
        given: dict[str, Any] = {}
        if clip_low is not None:
            given["clip_low"] = clip_low
        if clip_high is not None:
            given["clip_high"] = clip_high
        if self.dual_clip is not None:
            given["dual_clip"] = self.dual_clip
        if self.parallel.sequence_group is not None and self._sees_sequences():
            given["sequence_group"] = self.parallel.sequence_group
        loss = find_loss(self.loss_type)[0]
        return functools.partial(loss, **given) if given else loss

    def _sees_sequences(self) -> bool:
        """Whether the loss takes a sequence_group; a function of the caller's has to."""
        loss, _, over = find_loss(self.loss_type)
        if not self.own_function:
            return over is not None
        if "sequence_group" not in inspect.signature(loss).parameters:
            raise ValueError(
                "with sequence_group, a loss_type of your own must take it as a keyword, to sum "
                f"over sequences as a whole; got {self.loss_type!r}"
            )
        return True

    @property
    def has_bonus(self) -> bool:
        """Whether there is an entropy bonus; the value of a tensor is not looked at."""
        coef = self.entropy_bonus.coef
        return isinstance(coef, Tensor) or coef != 0

    def reads_beyond_selected(self, on_policy: bool) -> str | None:
        """The option, if any, that reads log-probs or entropies of tokens that are not selected."""
        if self.sequence_over == "all":
            return f'loss_type={self.loss_type!r} with sequence_over="all"'
        kind, current = self.correction.type, self.correction.of == "current"
        if (on_policy or current) and kind is not None and kind.startswith("sequence"):
            return f"Correction.type={kind!r} " + (
                'with of="current"' if current else "without old_logprob"
            )
        if self.kl.on == "all":
            return 'KL.on="all"'
        return 'EntropyBonus.on="all"' if self.entropy_bonus.on == "all" else None

    def check_call(self, has_entropy: bool, has_old: bool) -> None:
        """What a call needs, and a loss whose options are fixed beforehand does not."""
        _check_sequences(self)
        _check_aggregation(self)
        _check_correction(self, has_old)
        if self.parallel.group is not None and not self.counts_left:
            given = self.denominator, self.aggregation.num_sequences
            raise ValueError(
                "group is for counts that are left to the loss; one that is given has to be the "
                "mean count per rank already (distributed.mean_count), without group; got "
                f"denominator={given[0]}, num_sequences={given[1]}"
            )
        coef = self.kl.coef
        if (isinstance(coef, Tensor) or coef != 0) and self.kl.reference_logprob is None:
            raise ValueError(f"KL.coef={coef} needs reference_logprob")
        if self.has_bonus and not has_entropy:
            raise ValueError(f"EntropyBonus.coef={self.entropy_bonus.coef} needs entropy")


def check_kinds(**given: tuple[object, type]) -> None:
    """Each option is of its class."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AE" else "a"
            raise ValueError(f"{name} must be {article} {kind.__name__}; got {shown(value)}")


def _check_denominator(denominator: object) -> None:
    if not isinstance(denominator, str):
        check_count("denominator", denominator, '"selected", "all" or ')
    elif denominator not in ("selected", "all"):
        raise ValueError(f'denominator must be "selected", "all" or a count; got {denominator!r}')


def _check_clips(options: LossOptions) -> None:
    """Distances from a ratio of 1: beyond 1 the lower bound is negative, or a bound was given.

    gmpo's clips are of a log-ratio, dppo's of a probability, and cispo's lower one may be any.
    """
    loss_type, clip_low, clip_high = options.loss_type, options.clip_low, options.clip_high
    for name, clip in {"clip_low": clip_low, "clip_high": clip_high}.items():
        if clip is not None:
            check_clip(name, clip)
    if options.dual_clip is not None:
        check_number("dual_clip", options.dual_clip, "a number > 1 or None", lambda x: x > 1)
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": options.dual_clip}
    clips_taken = _CLIPS[loss_type] if isinstance(loss_type, str) else ()
    for name, value in clips.items():
        if value is not None and name not in clips_taken:
            raise ValueError(
                f"{name} has no meaning with loss_type={loss_type!r}; a function's own options are "
                f"set by functools.partial; got {name}={value}"
            )
    if not isinstance(loss_type, str) or LOSSES[loss_type][0] not in _OF_RATIOS:
        return
    if is_number(clip_low) and clip_low > 1:  # type: ignore[operator]
        raise ValueError(
            f"clip_low must lie in [0, 1], a distance below the ratio 1, with "
            f"loss_type={loss_type!r}; got clip_low={clip_low}"
        )
    if is_number(clip_high) and 1 < clip_high < 2:  # type: ignore[operator]
        low = f", and {clip_low:g} is clip_low={1 - clip_low:g}" if is_number(clip_low) else ""  # type: ignore[operator]
        warn_once(
            "clip_high",
            f"clip_high={clip_high} is a distance: ratios are clipped at {1 + clip_high:g}; the "  # type: ignore[operator]
            f"bound {clip_high:g} is clip_high={clip_high - 1:g}{low}",  # type: ignore[operator]
        )


def _check_sequences(options: LossOptions) -> None:
    loss_type, over = options.loss_type, options.aggregation.sequence_over
    of_tokens = isinstance(loss_type, str) and find_loss(loss_type)[2] is None
    if over is not None and of_tokens:
        raise ValueError(f"sequence_over has no meaning with loss_type={loss_type!r}; got {over!r}")


def _check_aggregation(options: LossOptions) -> None:
    loss_type, denominator = options.loss_type, options.denominator
    aggregation, is_word = options.aggregation_type, isinstance(denominator, str)
    what = f"with loss_type={loss_type!r} and aggregation {aggregation!r}"
    if aggregation == "token-mean" and options.aggregation.num_sequences is not None:
        raise ValueError(f"num_sequences has a meaning with the seq-mean aggregations only, {what}")
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


def _check_correction(options: LossOptions, has_old: bool) -> None:
    kind = options.correction.type
    if kind is None:
        return
    if options.correction.sampler_logprob is None:
        raise ValueError(f"Correction.type={kind!r} needs sampler_logprob")
    if options.correction.of == "current" and not has_old:
        raise ValueError('Correction.of="current" needs old_logprob, the sampler\'s; got None')
    if options.loss_type == "vespo":
        raise ValueError(
            'loss_type="vespo" has a weight of its own for the whole mismatch: give '
            f"sampler_logprob as old_logprob; got Correction.type={kind!r}"
        )
