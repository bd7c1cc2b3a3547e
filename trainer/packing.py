"""Sequences of a micro-batch packed into rows, so that the backbone reads few padding tokens.

A sequence is a prompt and its response but for the last token, which predicts nothing. Positions
restart at 0 with each sequence; by them attention keeps sequences of one row apart.
B sequences, R rows, W their width, N tokens that are read, T response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trainer.batch import Rollouts

# "row": all in one row, without padding, for attention by sequence lengths. "rows": rows no longer
# than the longest sequence, so attention reads no more than padded sequences would have. "padded":
# a sequence a row, for models that do not keep packed ones apart.
Layout = Literal["row", "rows", "padded"]


@dataclass(frozen=True)
class Packed:
    """What the backbone reads, and where the states of the response tokens are."""

    tokens_RW: Tensor  # int64; padding is 0
    positions_RW: Tensor  # int64, from 0 in each sequence; padding is 0
    mask_RW: Tensor | None  # bool: not padding; None where rows hold several sequences
    index_T: Tensor  # place in R*W of the state that predicts each response token


def lengths(rollouts: Rollouts) -> list[int]:
    """How many tokens of each sequence the backbone reads."""
    return (rollouts.prompt_mask_BP.sum(1) + rollouts.mask_BL.sum(1) - 1).tolist()


def pack(rollouts: Rollouts, layout: Layout) -> Packed:
    """The sequences of `rollouts` in rows. index_T is in the order of `x_BL[mask_BL]`."""
    read_BS = torch.cat([rollouts.prompt_mask_BP, rollouts.mask_BL[:, 1:]], 1)
    tokens_N = torch.cat([rollouts.prompt_BP, rollouts.response_BL[:, :-1]], 1)[read_BS]
    length_B, prompt_B = read_BS.sum(1), rollouts.prompt_mask_BP.sum(1)
    # Or the state before its response would be another sequence's; `prompt_ids` refuses it.
    assert (prompt_B > 0).all(), "a prompt without a token"
    packed = arrange(tokens_N, length_B, layout)
    begin_B = length_B.cumsum(0) - length_B
    number_T = _runs(begin_B + prompt_B - 1, rollouts.mask_BL.sum(1))
    return replace(packed, index_T=packed.index_T[number_T])


def arrange(tokens_N: Tensor, length_B: Tensor, layout: Layout) -> Packed:
    """Sequences of `length_B` tokens, given one after the other, in rows; index_T of every token.

    Of no sequence: one token of padding, for there are ranks that have to run their backbone.
    """
    device = tokens_N.device
    length_B = length_B.to(device)
    begins, (rows, width) = _places(length_B.tolist(), layout)
    begin_B = torch.tensor(begins, dtype=torch.long, device=device)
    place_N = _runs(begin_B, length_B)
    tokens = torch.zeros(rows * width, dtype=torch.long, device=device)
    positions, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    tokens[place_N] = tokens_N
    positions[place_N] = _runs(torch.zeros_like(begin_B), length_B)
    mask[place_N] = True
    return Packed(
        tokens.view(rows, width),
        positions.view(rows, width),
        mask.view(rows, width) if layout == "padded" else None,
        place_N,
    )


def _runs(begin_B: Tensor, count_B: Tensor) -> Tensor:
    """begin, begin + 1, ... of each sequence, `count_B` numbers each, one after the other."""
    before_B = count_B.cumsum(0) - count_B
    number = torch.arange(int(count_B.sum()), device=begin_B.device)
    return number + (begin_B - before_B).repeat_interleave(count_B)


def _places(lengths: Sequence[int], layout: Layout) -> tuple[list[int], tuple[int, int]]:
    """Where each sequence begins in R*W, and (R, W)."""
    if layout == "row":
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        return ends[:-1], (1, max(ends[-1], 1))
    width = max(lengths, default=1)
    if layout == "padded":
        return [row * width for row in range(len(lengths))], (max(len(lengths), 1), width)
    # First fit, longest first.
    filled: list[int] = []
    begins = [0] * len(lengths)
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        fits = (r for r, used in enumerate(filled) if used + lengths[b] <= width)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
        begins[b] = row * width + filled[row]
        filled[row] += lengths[b]
    return begins, (max(len(filled), 1), width)
