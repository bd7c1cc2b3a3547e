"""Tokens of sequences one after the other, [T], and the same in rows, [B, L].

T tokens, B sequences, L the longest.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import check_tensor, readable


class Ragged(NamedTuple):
    """Where tokens that lie one sequence after another are in rows."""

    index_T: Tensor
    """The place of each token in B * L."""
    shape: tuple[int, int]
    """B and L."""


def in_rows(lengths_B: Tensor, like_T: Tensor) -> Ragged:
    """Rows for sequences of `lengths_B` tokens.

    The rows need the longest length on the host: one wait for a GPU, none for lengths on a CPU.
    Inside of torch.compile, which cannot wait, rows are T long.
    """
    tokens, sequences = like_T.shape[0], lengths_B.shape[0]
    longest = tokens
    if not torch.compiler.is_compiling():
        longest = int(lengths_B.max()) if sequences else 0
    lengths_B = on_device(lengths_B, like_T)
    sequence_T = sequence_numbers(lengths_B, tokens)
    begin_B = lengths_B.cumsum(0) - lengths_B
    place_T = torch.arange(tokens, device=like_T.device) - begin_B[sequence_T]
    return Ragged(sequence_T * longest + place_T, (sequences, longest))


def on_device(lengths_B: Tensor, like: Tensor) -> Tensor:
    """`lengths_B` where `like` is; from a CPU by a copy that does not wait for a GPU."""
    return lengths_B.to(like.device, non_blocking=True)


def rows(x: Any, ragged: Ragged) -> Any:
    """[B, L] of [T], zero or false beyond a sequence's end; of anything else the same."""
    if not isinstance(x, Tensor) or x.shape != ragged.index_T.shape:
        return x
    flat = x.new_zeros(ragged.shape[0] * ragged.shape[1])
    return flat.index_copy(0, ragged.index_T, x).view(ragged.shape)


def sequence_numbers(lengths_B: Tensor, tokens: int) -> Tensor:
    """The number of each token's sequence, [T]."""
    numbers_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
    return numbers_B.repeat_interleave(lengths_B, output_size=tokens)


def check_lengths(lengths: object, tokens: Tensor, name: str) -> None:
    """`lengths` int64 [B] on a CPU or on the device of `tokens`, which it divides.

    Raises:
        ValueError: on a CPU also for a length below 0 and a sum that is not T.
    """
    check_tensor("lengths", lengths)
    assert isinstance(lengths, Tensor)
    if lengths.dtype != torch.int64 or lengths.ndim != 1:
        raise ValueError(f"lengths must be int64 [B]; got {lengths.dtype} {tuple(lengths.shape)}")
    if lengths.device.type != "cpu" and lengths.device != tokens.device:
        raise ValueError(f"lengths must be on {tokens.device} or cpu; got {lengths.device}")
    if tokens.ndim != 1:
        raise ValueError(
            f"with lengths, {name} must be [T], sequences one after the other; "
            f"got {tuple(tokens.shape)}"
        )
    if not lengths.numel() and tokens.numel():
        raise ValueError(f"lengths must add up to {name}'s {tokens.numel()} tokens; got none")
    if readable(lengths):
        if int(lengths.min()) < 0:
            raise ValueError(f"lengths must be >= 0; got {int(lengths.min())}")
        if int(lengths.sum()) != tokens.shape[0]:
            raise ValueError(
                f"lengths must add up to {name}'s {tokens.shape[0]} tokens; "
                f"got {int(lengths.sum())}"
            )
