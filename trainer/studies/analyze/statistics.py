"""Entropies of any number of tokens in a fixed amount of memory."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# The top bits of an fp32 that is not negative: 8 of the exponent, 9 of the mantissa.
_SHIFT = 14
BINS = 1 << (31 - _SHIFT)


class EntropyStatistics:
    """Counts of a stream of (token, entropy), by entropy and by token.

    State: 131,072 counts by the top bits of the entropy as fp32, whose order is that of the
    numbers. Beside them the least and the greatest entropy of each bin, and a count and a sum for
    each token of the vocabulary. A bin is 1/512 of its entropies wide, and a percentile is within
    it.
    """

    def __init__(self, vocabulary: int):
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.least = torch.full((BINS,), torch.inf)
        self.greatest = torch.zeros(BINS)
        self.count_V = torch.zeros(vocabulary, dtype=torch.int64)
        self.sum_V = torch.zeros(vocabulary, dtype=torch.float64)

    def update(self, token_T: Tensor, entropy_T: Tensor) -> None:
        """Add tokens by id and the entropies, nats, of the distributions they were sampled from.

        Raises ValueError for different shapes, ids outside the vocabulary, and entropies that are
        negative beyond rounding or not finite.
        """
        if token_T.shape != entropy_T.shape or token_T.dim() != 1:
            raise ValueError(
                "tokens and entropies must be vectors of one length; got "
                f"{tuple(token_T.shape)} and {tuple(entropy_T.shape)}"
            )
        if not len(token_T):
            return
        token_T, entropy_T = token_T.cpu(), entropy_T.detach().float().cpu()
        least, greatest = int(token_T.min()), int(token_T.max())
        if least < 0 or greatest >= len(self.count_V):
            raise ValueError(
                f"token ids must lie in [0, {len(self.count_V)}); got {least} to {greatest}"
            )
        if not entropy_T.isfinite().all() or bool((entropy_T < -1e-3).any()):
            raise ValueError(
                "entropies must be finite and not negative; got "
                f"{float(entropy_T.min())} to {float(entropy_T.max())}"
            )
        entropy_T = entropy_T.clamp_min(0)
        bins_T = entropy_T.view(torch.int32) >> _SHIFT
        self.histogram += torch.bincount(bins_T, minlength=BINS)
        self.least.scatter_reduce_(0, bins_T.long(), entropy_T, "amin")
        self.greatest.scatter_reduce_(0, bins_T.long(), entropy_T, "amax")
        self.count_V += torch.bincount(token_T, minlength=len(self.count_V))
        self.sum_V.index_add_(0, token_T, entropy_T.double())

    @property
    def count(self) -> int:
        """The number of tokens so far."""
        return int(self.histogram.sum())

    def mean(self) -> float:
        """The mean of all entropies, in nats."""
        return float(self.sum_V.sum()) / max(self.count, 1)

    def share_below(self, entropy: float) -> float:
        """Share of the tokens with an entropy below `entropy`, as if its bin were evenly filled."""
        entropy = float(torch.tensor(max(entropy, 0.0)))  # fp32, as those that are counted
        edge = int(torch.tensor(entropy).view(torch.int32)) >> _SHIFT
        inside, least = int(self.histogram[edge]), float(self.least[edge])
        wide = float(self.greatest[edge]) - least
        part = min(max(entropy - least, 0.0) / wide, 1.0) if wide > 0 else float(entropy > least)
        return (int(self.histogram[:edge].sum()) + part * inside) / max(self.count, 1)

    def percentile(self, percent: float) -> float:
        """The entropy that `percent` of 100 of the tokens do not exceed, within 1/512 of itself.

        Its bin is taken as evenly filled from its least to its greatest. So an entropy that all
        tokens share is itself, and not the lower edge of its bin, which is below the mean.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile lies in [0, 100]; got {percent}")
        if not self.count:
            raise ValueError("no percentile of no tokens")
        rank = max(math.ceil(percent / 100 * self.count), 1)
        below = self.histogram.cumsum(0)
        place = int(torch.searchsorted(below, torch.tensor(rank)))
        inside, least = int(self.histogram[place]), float(self.least[place])
        part = (rank - int(below[place]) + inside - 1) / max(inside - 1, 1)
        return least + part * (float(self.greatest[place]) - least)

    def shares(self, edges: Sequence[float]) -> list[float]:
        """Share of the tokens in each [edges[i], edges[i + 1])."""
        below = [self.share_below(edge) for edge in edges]
        return [after - before for before, after in pairwise(below)]

    def tokens(self, minimum: int) -> list[tuple[int, int, float]]:
        """(id, count, mean entropy) of tokens sampled `minimum` times or more, highest first."""
        ids = (self.count_V >= max(minimum, 1)).nonzero().squeeze(1)
        mean_N = self.sum_V[ids] / self.count_V[ids]
        order = mean_N.argsort(descending=True, stable=True)
        return [(int(ids[i]), int(self.count_V[ids[i]]), float(mean_N[i])) for i in order]
