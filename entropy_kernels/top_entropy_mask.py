"""Exact selection of the highest-entropy tokens: the indicator I[H >= tau] of equation 6.

"Beyond the 80/20 Rule" (arXiv 2506.01939), section 5.1, trains on the `fraction` of the tokens
with the highest entropy. Only valid tokens count (no prompt, padding or tool token). Of n valid
tokens

    k = max(1, ceil(fraction * n))

are selected, with `fraction` read as a decimal: 0.55 of 100 is 55, though fp64's product is larger.
With n = 0 the threshold is +inf and nothing is selected. A NaN ranks above every number, so a
broken entropy is selected and shows in the loss instead of disappearing. -0 equals +0. The head
gives rows without a target entropy 0: leave them out of the mask.

Nothing here is differentiable, and nothing waits for a GPU. B sequences, L tokens per sequence.
"""

import torch
from torch import Generator, Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_choice, check_fraction, check_generator, check_group, shown
from ._radix import (
    check_tokens,
    flat,
    kth_largest,
    select_k_largest,
    select_largest_of_rows,
    select_threshold,
)
from ._shapes import Bool, Float
from .backends import check_impl

SCOPES = ("batch", "sequence")
WHICH = ("top", "bottom", "random")
TIES = ("exact", "threshold")


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
    impl: str = "auto",
) -> Bool[Tensor, "*shape"]:
    """The k valid tokens with the highest entropy, k = max(1, ceil(fraction * n)), as a mask.

    Args:
        entropy: fp32 of any shape, nats.
        mask: bool, the valid tokens; None for all.
        scope: "batch" takes n and k over all tokens of the call (the paper, section 5.1) and of all
            ranks of `group`. "sequence" takes them over each row of [B, L] by itself, by a sort.
        which: "top"; "bottom", the k lowest (a NaN first here too); "random", k uniformly random
            valid tokens, the control of arXiv 2605.07660. It ignores every entropy but NaN, which
            comes first here too.
        ties: "exact" selects exactly k, at the threshold those of the lowest (rank, index) first;
            "threshold" selects every token that ranks there or above, the paper's indicator.
        group: as in `entropy_threshold`; "exact" ties move one more int64 per rank.
        generator: what "random" draws from, by torch.rand; seed the ranks differently.
        impl: as in `entropy_threshold`. The sort of scope="sequence" is plain PyTorch: "auto" or
            "torch".

    Returns a bool tensor of entropy's shape, false wherever `mask` is.

    Raises:
        ValueError: as `entropy_threshold`; an unknown option; scope="sequence" with other than two
            dimensions or with a group (a sequence lives on one rank); a generator where nothing is
            random.
    """
    check_tokens(entropy, mask)
    check_fraction(fraction)
    _check_options(entropy, scope, which, ties, group, generator, impl)
    score = _score(entropy.detach(), which, generator)
    if scope == "sequence":
        return select_largest_of_rows(score, mask, fraction, ties)
    values, valid = flat(score, mask)
    if ties == "threshold":
        kth = kth_largest([(values, valid)], fraction, group, impl)
        selected = select_threshold(values, valid, kth.value)
    else:
        selected = select_k_largest(values, valid, fraction, group, impl)
    return selected.view(entropy.shape)


def _score(entropy: Tensor, which: str, generator: Generator | None) -> Tensor:
    """What `which` selects the largest of; NaN where the entropy is, which ranks first."""
    if which == "random":
        lot = torch.rand(
            entropy.shape, generator=generator, dtype=torch.float32, device=entropy.device
        )
        return lot.masked_fill(entropy.isnan(), torch.nan)
    return -entropy if which == "bottom" else entropy


def _check_options(
    entropy: Tensor,
    scope: str,
    which: str,
    ties: str,
    group: ProcessGroup | None,
    generator: Generator | None,
    impl: str,
) -> None:
    check_choice("scope", scope, SCOPES)
    check_choice("which", which, WHICH)
    check_choice("ties", ties, TIES)
    check_group("group", group)
    if generator is not None and which != "random":
        raise ValueError(f'generator is for which="random"; got which={which!r}')
    check_generator(generator, entropy, "entropy")
    check_impl(impl, "selection")
    if scope == "batch":
        return
    if entropy.dim() != 2:
        raise ValueError(f'scope="sequence" needs entropy of [B, L]; got {tuple(entropy.shape)}')
    if group is not None:
        raise ValueError(
            f'scope="sequence" takes no group, as a sequence lives on one rank; got {shown(group)}'
        )
    if impl not in ("auto", "torch"):
        raise ValueError(
            f'scope="sequence" is a sort in plain PyTorch, impl "auto" or "torch"; got {impl=}'
        )
