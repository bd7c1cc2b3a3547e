"""Differences between two policies' entropies of the same tokens."""

import torch
from torch import Tensor

import entropy_kernels as ek


def top_mask(entropy_T: Tensor, fraction: float) -> Tensor:
    """The ceil(fraction T) tokens with the highest entropies, exactly."""
    return ek.top_entropy_mask(entropy_T, torch.ones_like(entropy_T, dtype=torch.bool), fraction)


def overlap(first_T: Tensor, second_T: Tensor) -> float:
    """|A and B| / |B| of two masks: the share of B that A catches; by chance A's share of T.

    Raises ValueError for an empty B.
    """
    if not second_T.any():
        raise ValueError("an overlap with no tokens has no value")
    return float((first_T & second_T).sum() / second_T.sum())


def rank_bins(entropy_T: Tensor, bins: int) -> Tensor:
    """The bin, 0 to `bins` - 1, of each token by the rank of its entropy; ties by position."""
    rank_T = torch.empty_like(entropy_T, dtype=torch.long)
    rank_T[entropy_T.argsort(stable=True)] = torch.arange(len(entropy_T))
    return rank_T * bins // len(entropy_T)


def change_by_bin(base_T: Tensor, other_T: Tensor, bins: int) -> list[dict[str, float]]:
    """Upper edge, mean change and mean absolute change of each bin of the base's entropies."""
    bin_T, change_T = rank_bins(base_T, bins), (other_T - base_T).double()
    found = []
    for number in range(bins):
        inside = bin_T == number
        if not inside.any():
            raise ValueError(f"{len(base_T)} tokens are too few for {bins} bins")
        found.append(
            {
                "upper": float(base_T[inside].max()),
                "tokens": int(inside.sum()),
                "change": float(change_T[inside].mean()),
                "absolute": float(change_T[inside].abs().mean()),
            }
        )
    return found


def rank_correlation(first_T: Tensor, second_T: Tensor) -> float:
    """Spearman's rank correlation; ties are ordered by position."""
    ranks = torch.stack([rank_bins(x, len(x)).double() for x in (first_T, second_T)])
    return float(torch.corrcoef(ranks)[0, 1])
