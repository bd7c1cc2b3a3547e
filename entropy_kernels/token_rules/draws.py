"""Random tokens with weights that leave the gradient unbiased.

B sequences of L tokens, or T tokens of B sequences.
"""

import torch
from torch import Generator, Tensor

from .._arguments import check_fraction, check_generator, check_tensor, check_whole
from .._ragged import check_lengths, on_device, sequence_numbers
from .._shapes import Bool, Float, Int


def random_tokens(
    mask: Bool[Tensor, "*tokens"], fraction: float = 0.5, *, generator: Generator | None = None
) -> tuple[Bool[Tensor, "*tokens"], Float[Tensor, "*tokens"]]:
    """Each token of `mask` by itself with probability `fraction`, and its weight, 1 / fraction.

    NAT's uniform random sampling (arXiv 2603.06619), which trains on half of the tokens. The
    weights are Horvitz and Thompson's: the sum of w_t x_t over the drawn tokens has the sum of x_t
    over all as its mean. So divide by the number of all tokens, not of the drawn: `selected=`,
    `Aggregation.token_weight` and `denominator="all"`. Not drawn tokens have weight 0, fp32. That
    draws are independent is our reading.
    """
    check_tensor("mask", mask, "bool")
    check_fraction(fraction)
    check_generator(generator, mask, "mask")
    drawn = mask & (torch.rand(mask.shape, generator=generator, device=mask.device) < fraction)
    return drawn, drawn / fraction


def random_prefixes(
    mask: Bool[Tensor, "*tokens"],
    fraction: float = 0.5,
    *,
    least: int = 1,
    lengths: Int[Tensor, " B"] | None = None,
    generator: Generator | None = None,
) -> tuple[Bool[Tensor, "*tokens"], Float[Tensor, "*tokens"]]:
    """The first tokens of each sequence, cut at random, and their weights 1 / P(kept), fp32.

    NAT's random prefix cutting (arXiv 2603.06619): what is behind the cut needs no forward either.
    Of n tokens in the mask max(least, ceil(n u^(1 / fraction - 1))) are kept, u uniform in (0, 1).
    So token t = 1, 2, ... is kept with p_t = 1 - ((t - 1) / n)^(fraction / (1 - fraction)), or 1
    for t <= least. At fraction 0.5 the length is uniform over 1 to n; at 1 all is kept. A sequence
    keeps `fraction` of its tokens on average, and up to one token more. Use weights and denominator
    as those of `random_tokens`. We have not found the paper's distribution: these lengths are ours.

    mask is [B, L], or [T] with `lengths`: int64 [B], tokens of sequences one after the other.
    """
    check_tensor("mask", mask, "bool")
    check_fraction(fraction)
    check_whole("least", least, 1, "an int >= 1")
    check_generator(generator, mask, "mask")
    if lengths is not None:
        check_lengths(lengths, mask, "mask")
    elif mask.ndim != 2:
        raise ValueError(f"mask must be [B, L], or [T] with lengths; got {tuple(mask.shape)}")
    sequences = len(mask) if lengths is None else len(lengths)
    u_B = torch.rand(sequences, generator=generator, dtype=torch.float64, device=mask.device)
    place, count, u = _places(mask, u_B, lengths)
    if fraction == 1:
        return mask, mask.float()
    kept = mask & (place <= (count * u ** (1 / fraction - 1)).ceil().clamp_min(least))
    before = (place - 1).clamp_min(0) / count.clamp_min(1)
    p = (1 - before ** (fraction / (1 - fraction))).masked_fill(place <= least, 1.0)
    return kept, torch.where(kept, 1 / p, 0.0).float()


def _places(mask: Tensor, u_B: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's place in its sequence, from 1, fp64, the sequence's count, and its u."""
    if lengths_B is None:
        count_B = mask.sum(1).double()
        return mask.cumsum(1).double(), count_B[:, None], u_B[:, None]
    sequence_T = sequence_numbers(on_device(lengths_B, mask), len(mask))
    count_B = torch.zeros_like(u_B).index_add(0, sequence_T, mask.double())
    before_B = count_B.cumsum(0) - count_B
    place_T = mask.cumsum(0) - before_B[sequence_T]
    return place_T, count_B[sequence_T], u_B[sequence_T]
