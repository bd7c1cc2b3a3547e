"""Exact selection of the highest-entropy tokens: the indicator I[H >= tau] of equation 6.

"Beyond the 80/20 Rule" (arXiv 2506.01939), section 5.1, trains on the `fraction` of the tokens
with the highest entropy. Only valid tokens count (no prompt, padding or tool token): of n,

    k = max(1, ceil(fraction * n))

are selected, `fraction` being read as a decimal: 0.55 of 100 is 55, though fp64's product is
above it. With n = 0 the threshold is +inf and nothing is selected. A NaN ranks above every number,
so a broken entropy is selected and shows in the loss instead of disappearing. -0 equals +0. Rows
whose target is -100 have entropy 0 and are no tokens: leave them out of the mask.

Nothing here is differentiable, and nothing waits for a GPU. B sequences, L tokens a sequence.
"""

import torch
from torch import Generator, Tensor
from torch.distributed import ProcessGroup

from ._arguments import (
    check_choice,
    check_fraction,
    check_generator,
    check_group,
    check_tensor,
    shown,
)
from ._radix import (
    Chunk,
    keep_largest,
    keep_largest_of_rows,
    keep_threshold,
    kth_largest,
)
from ._shapes import Bool, Float
from .distributed import rank_offset

SCOPES = ("batch", "sequence")
WHICH = ("top", "bottom", "random")
TIES = ("exact", "threshold")


def entropy_threshold(
    entropy: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    fraction: float = 0.2,
    *,
    group: ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """The entropy of the k-th highest valid token, k = max(1, ceil(fraction * n)).

    tau of equation 6 (arXiv 2506.01939, section 5.1): an entropy of the batch, the k-th largest
    exactly, not a value interpolated between two as torch.quantile's, which stops at 2**24
    elements besides. Three histograms of the bits, linear in n, with bounded memory.

    Args:
        entropy: fp32 of any shape, nats.
        mask: bool, the valid tokens; None for all.
        group: tokens of all its ranks count, and every rank calls, also one without a token; 40 KB
            of histograms a rank are summed and nothing else moves. None: this process alone.

    Returns a 0-dim fp32 on the device of `entropy`; +inf without a valid token.

    Raises:
        ValueError: another dtype, a mask of another shape or device, a fraction outside (0, 1].
    """
    check_tokens(entropy, mask)
    check_fraction(fraction)
    check_group("group", group)
    return kth_largest([flat(entropy, mask)], fraction, group).value


def top_entropy_mask(
    entropy: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    fraction: float = 0.2,
    *,
    scope: str = "batch",
    which: str = "top",
    ties: str = "exact",
    group: ProcessGroup | None = None,
    generator: Generator | None = None,
) -> Bool[Tensor, "*shape"]:
    """The k valid tokens with the highest entropy, k = max(1, ceil(fraction * n)), as a mask.

    Args:
        entropy: fp32 of any shape, nats.
        mask: bool, the valid tokens; None for all.
        scope: "batch" takes n and k over all tokens of the call (the paper, section 5.1) and of
            all ranks of `group`; "sequence" over each row of [B, L] by itself, by a sort.
        which: "top"; "bottom", the k lowest (a NaN first here too); "random", k uniformly random
            valid tokens, the control of arXiv 2605.07660, blind to all entropies but NaN, which
            come first here too.
        ties: "exact" keeps exactly k, at the threshold those of the lowest (rank, index) first;
            "threshold" keeps every token that ranks there or above, the paper's indicator.
        group: as in `entropy_threshold`; "exact" ties move one int64 a rank more.
        generator: what "random" draws from, by torch.rand; seed the ranks differently.

    Returns a bool tensor of entropy's shape, false wherever `mask` is.

    Raises:
        ValueError: as `entropy_threshold`; an unknown option; scope="sequence" with other than two
            dimensions or with a group (a sequence lives on one rank); a generator where nothing is
            random.
    """
    check_tokens(entropy, mask)
    check_fraction(fraction)
    _check_options(entropy, scope, which, ties, group, generator)
    score = _score(entropy.detach(), which, generator)
    if scope == "sequence":
        return keep_largest_of_rows(score, mask, fraction, ties)
    values, valid = flat(score, mask)
    kth = kth_largest([(values, valid)], fraction, group)
    if ties == "threshold":
        keep = keep_threshold(values, valid, kth.value)
    else:
        quota = kth.quota - rank_offset(kth.equal, group)
        keep = keep_largest(values, valid, kth.value, quota)
    return keep.view(entropy.shape)


def flat(score: Tensor, mask: Tensor | None) -> Chunk:
    """The tokens in one dimension, contiguous and without gradient."""
    values = score.detach().reshape(-1).contiguous()
    return values, None if mask is None else mask.reshape(-1).contiguous()


def _score(entropy: Tensor, which: str, generator: Generator | None) -> Tensor:
    """What `which` selects the largest of; NaN where the entropy is, which ranks first."""
    if which == "random":
        lot = torch.rand(
            entropy.shape, generator=generator, dtype=torch.float32, device=entropy.device
        )
        return lot.masked_fill(entropy.isnan(), torch.nan)
    return -entropy if which == "bottom" else entropy


def check_tokens(entropy: Tensor, mask: Tensor | None) -> None:
    check_tensor("entropy", entropy)
    if entropy.dtype != torch.float32:
        raise ValueError(f"entropy must be torch.float32; got {entropy.dtype}")
    if mask is not None:
        check_tensor("mask", mask, "bool", entropy, "entropy")


def _check_options(
    entropy: Tensor,
    scope: str,
    which: str,
    ties: str,
    group: ProcessGroup | None,
    generator: Generator | None,
) -> None:
    check_choice("scope", scope, SCOPES)
    check_choice("which", which, WHICH)
    check_choice("ties", ties, TIES)
    check_group("group", group)
    if generator is not None and which != "random":
        raise ValueError(f'generator is for which="random"; got which={which!r}')
    check_generator(generator, entropy, "entropy")
    if scope == "batch":
        return
    if entropy.dim() != 2:
        raise ValueError(f'scope="sequence" needs entropy of [B, L]; got {tuple(entropy.shape)}')
    if group is not None:
        raise ValueError(
            f'scope="sequence" takes no group, as a sequence lives on one rank; got {shown(group)}'
        )
