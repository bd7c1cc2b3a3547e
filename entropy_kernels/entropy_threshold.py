"""The exact entropy threshold tau of equation 6 ("Beyond the 80/20 Rule", arXiv 2506.01939)."""

from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_fraction, check_group
from ._radix import check_tokens, flat, kth_largest
from ._shapes import Bool, Float
from .backends import check_impl


def entropy_threshold(
    entropy: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    fraction: float = 0.2,
    *,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Float[Tensor, ""]:
    """The entropy of the k-th highest valid token, k = max(1, ceil(fraction * n)).

    This is tau of equation 6 (arXiv 2506.01939, section 5.1), exactly the k-th largest entropy of
    the batch. torch.quantile interpolates between two values, and stops at 2**24 elements. Three
    histograms of the bits take time linear in n and bounded memory.

    Args:
        entropy: fp32 of any shape, nats.
        mask: bool, the valid tokens; None for all.
        group: the ranks whose tokens count; None is this process alone. Every rank calls, also one
            without a token. Only 40 KB of histograms per rank are summed.
        impl: the histograms' kernel. "cpu", compiled, takes a CPU; "triton" and "cuda" a GPU;
            "torch" any device. "auto" is the fastest one known to be right there.

    Returns a 0-dim fp32 on the device of `entropy`; +inf without a valid token.

    Raises:
        ValueError: another dtype, a mask of another shape or device, a fraction outside (0, 1], an
            unknown `impl` or one that cannot run there.
    """
    check_tokens(entropy, mask)
    check_fraction(fraction)
    check_group("group", group)
    check_impl(impl, "selection")
    return kth_largest([flat(entropy, mask)], fraction, group, impl).value
