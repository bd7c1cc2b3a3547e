"""Tokens of sequences one after the other, [T], and the same in rows, [B, L].

T tokens, B sequences, L the longest.
"""

from typing import Any

import torch
from torch import Tensor

from ._arguments import check_tensor, readable


class Ragged:
    """Sequences of `lengths` tokens, given one after the other.

    The rows need the longest length on the host: one wait for a GPU, none for `lengths` on a CPU.
    Inside of torch.compile, which cannot wait, rows are T long.
    """

    def __init__(self, lengths_B: Tensor, like_T: Tensor) -> None:
        tokens, sequences = like_T.shape[0], lengths_B.shape[0]
        at_hand = not torch.compiler.is_compiling()
        longest = (int(lengths_B.max()) if at_hand else tokens) if sequences else 0
        lengths_B = lengths_B.to(like_T.device)
        self.sequence_T = sequence_numbers(lengths_B, tokens)
        begin_B = lengths_B.cumsum(0) - lengths_B
        place_T = torch.arange(tokens, device=like_T.device) - begin_B[self.sequence_T]
        self.shape = sequences, longest
        self.index_T = self.sequence_T * longest + place_T

    def rows(self, x: Any) -> Any:
        """[B, L] of [T], zero or false beyond a sequence's end; of anything else the same."""
        if not isinstance(x, Tensor) or x.shape != self.index_T.shape:
            return x
        flat = x.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, self.index_T, x).view(self.shape)

    def tokens(self, x_BL: Tensor) -> Tensor:
        """[T] of [B, L]."""
        return x_BL.reshape(-1)[self.index_T]


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
