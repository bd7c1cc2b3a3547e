"""What a loss reads of each token: checked, and in rows of sequences where it needs them.

T tokens, B sequences, L their length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import (
    LARGEST,
    check_advantage,
    check_logprobs,
    check_tensor,
    check_values,
    readable,
)
from ._loss_options import LossOptions
from ._ragged import check_lengths, in_rows, on_device, rows, sequence_numbers


class Tokens(NamedTuple):
    """Tensors of one shape, [T] or [B, L]; None where not given, or a number for all tokens."""

    logprob: Tensor
    old_logprob: Tensor | None
    advantage: Tensor
    mask: Tensor
    selected: Tensor
    entropy: Tensor | None
    clip_low: float | Tensor | None
    clip_high: float | Tensor | None
    token_weight: Tensor | None
    sampler_logprob: Tensor | None
    reference_logprob: Tensor | None
    kl_coef: float | Tensor


def read_tokens(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    selected: Tensor | None,
    entropy: Tensor | None,
    lengths: Tensor | None,
    options: LossOptions,
) -> Tokens:
    """The tokens of a call and of its options, in rows of sequences where the loss needs them.

    Raises:
        ValueError: a tensor that does not fit the others; no sequences where they are needed.
    """
    check_tensor("logprob", logprob, "floating-point")
    if lengths is not None:
        check_lengths(lengths, logprob, "logprob")
    tokens = Tokens(
        logprob,
        old_logprob,
        advantage,
        mask,
        mask if selected is None else selected,
        entropy,
        options.clip_low,
        options.clip_high,
        options.aggregation.token_weight,
        options.correction.sampler_logprob,
        options.kl.reference_logprob,
        options.kl.coef,
    )
    _check_shapes(tokens)
    _check_advantage(advantage, logprob, lengths)
    _check_count("denominator", options.denominator, logprob)
    _check_count("num_sequences", options.aggregation.num_sequences, logprob)
    tokens = tokens._replace(advantage=_per_token(advantage, logprob, lengths))
    if options.of_sequences is None and not (lengths is not None and options.own_function):
        return tokens
    if lengths is not None:
        ragged = in_rows(lengths, logprob)
        return Tokens(*(rows(x, ragged) for x in tokens))
    if logprob.ndim != 2:
        raise ValueError(
            f"{options.of_sequences} needs sequences: [B, L] inputs, or [T] with lengths; "
            f"got {tuple(logprob.shape)}"
        )
    return tokens


def check_contents(tokens: Tokens, seen: Tensor) -> None:
    """What can be seen on a CPU: of tensors, what values at the tokens `seen` cannot be.

    A NaN can, of data: it makes the loss NaN, on every device.
    """
    check_logprobs("logprob", tokens.logprob, seen, inf=True)
    check_logprobs("old_logprob", tokens.old_logprob, seen)
    check_logprobs("sampler_logprob", tokens.sampler_logprob, seen)
    check_logprobs("reference_logprob", tokens.reference_logprob, seen)
    check_values("advantage", tokens.advantage, "finite", -LARGEST, LARGEST, seen)
    weight = tokens.token_weight
    if weight is not None and weight.dtype != torch.bool:
        check_values("token_weight", weight, ">= 0 and finite", 0, LARGEST, seen)
    check_values("clip_low", tokens.clip_low, ">= 0", 0, torch.inf)
    check_values("clip_high", tokens.clip_high, ">= 0", 0, torch.inf)
    check_values("KL.coef", tokens.kl_coef, "finite", -LARGEST, LARGEST, seen)


def _check_shapes(tokens: Tokens) -> None:
    """Kinds, shapes and devices."""
    check_tensor("mask", tokens.mask, "bool", tokens.logprob, "logprob")
    check_tensor("selected", tokens.selected, "bool", tokens.logprob, "logprob")
    per_token = {
        "old_logprob": tokens.old_logprob,
        "sampler_logprob": tokens.sampler_logprob,
        "reference_logprob": tokens.reference_logprob,
        "entropy": tokens.entropy,
    }
    for name, x in per_token.items():
        if x is not None:
            check_tensor(name, x, "floating-point", tokens.logprob, "logprob")
    weight = tokens.token_weight
    if weight is not None:
        kind = "bool" if weight.dtype == torch.bool else "floating-point"
        check_tensor("token_weight", weight, kind, tokens.logprob, "logprob")
    numbers = {
        "clip_low": tokens.clip_low,
        "clip_high": tokens.clip_high,
        "KL.coef": tokens.kl_coef,
    }
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            like = tokens.logprob if number.ndim else tokens.logprob.new_empty(())
            check_tensor(name, number, "floating-point", like, "logprob")


def _per_token(advantage: Tensor, logprob: Tensor, lengths: Tensor | None) -> Tensor:
    """The advantage of each token, from one per token or per sequence; NaN where, unseen by
    `_check_advantage`, it could be either."""
    advantage, shape = advantage.detach(), logprob.shape
    if lengths is None:
        return advantage if advantage.shape == shape else advantage.unsqueeze(1).expand(shape)
    if advantage.shape != shape:
        return advantage[sequence_numbers(on_device(lengths, logprob), shape[0])]
    if lengths.shape != shape or lengths.device != logprob.device:
        return advantage
    return advantage.where((lengths == 1).all(), torch.nan)


def _check_advantage(advantage: Tensor, logprob: Tensor, lengths: Tensor | None) -> None:
    """One per token, or one per sequence of [B, L] or of `lengths`."""
    if lengths is None:
        check_advantage(advantage, logprob)
        return
    check_tensor("advantage", advantage, "floating-point")
    if advantage.device != logprob.device:
        raise ValueError(
            f"advantage must be on {logprob.device}, like logprob; got {advantage.device}"
        )
    if advantage.shape not in (logprob.shape, lengths.shape):
        raise ValueError(
            f"advantage must be one per token, {tuple(logprob.shape)}, or per sequence, "
            f"{tuple(lengths.shape)}; got {tuple(advantage.shape)}"
        )
    # Sequences of one token each have one advantage either way.
    if logprob.shape == lengths.shape and readable(lengths) and not bool((lengths == 1).all()):
        raise ValueError(
            f"advantage {tuple(advantage.shape)} is one per token and one per sequence: leave out "
            f"the sequences without a token; got lengths={lengths.tolist()}"
        )


def _check_count(name: str, count: object, logprob: Tensor) -> None:
    """A count on another device would have to be moved; a CPU's is read."""
    if isinstance(count, Tensor) and count.device.type != "cpu" and count.device != logprob.device:
        raise ValueError(f"{name} must be on {logprob.device}, like logprob; got {count.device}")
