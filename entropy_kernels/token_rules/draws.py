"""Random tokens with weights that leave the gradient unbiased; B sequences of L tokens."""

import torch
from torch import Generator, Tensor

from .._arguments import check_fraction, check_generator, check_tensor, check_whole
from .._shapes import Bool, Float


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
    mask: Bool[Tensor, "B L"],
    fraction: float = 0.5,
    *,
    least: int = 1,
    generator: Generator | None = None,
) -> tuple[Bool[Tensor, "B L"], Float[Tensor, "B L"]]:
    """The first tokens of each sequence, cut at random, and their weights 1 / P(kept), fp32.

    NAT's random prefix cutting (arXiv 2603.06619): what is behind the cut needs no forward either.
    Of n tokens in the mask max(least, ceil(n u^(1 / fraction - 1))) are kept, u uniform in (0, 1).
    So token t = 1, 2, ... is kept with p_t = 1 - ((t - 1) / n)^(fraction / (1 - fraction)), or 1
    for t <= least. At fraction 0.5 the length is uniform over 1 to n; at 1 all is kept. A sequence
    keeps `fraction` of its tokens on average, and up to one token more. Use weights and denominator
    as those of `random_tokens`. We have not found the paper's distribution: these lengths are ours.
    """
    check_tensor("mask", mask, "bool")
    if mask.ndim != 2:
        raise ValueError(f"mask must be [B, L]; got {tuple(mask.shape)}")
    check_fraction(fraction)
    check_whole("least", least, 1, "an int >= 1")
    check_generator(generator, mask, "mask")
    place_BL = mask.cumsum(1)
    count_B1 = place_BL[:, -1:].double() if mask.shape[1] else place_BL.double()
    u_B1 = torch.rand((len(mask), 1), generator=generator, dtype=torch.float64, device=mask.device)
    if fraction == 1:
        return mask, mask.float()
    length_B1 = (count_B1 * u_B1 ** (1 / fraction - 1)).ceil().clamp_min(least)
    kept_BL = mask & (place_BL <= length_B1)
    before_BL = (place_BL - 1).clamp_min(0) / count_B1.clamp_min(1)
    p_BL = (1 - before_BL ** (fraction / (1 - fraction))).masked_fill(place_BL <= least, 1.0)
    return kept_BL, torch.where(kept_BL, 1 / p_BL, 0.0).float()
