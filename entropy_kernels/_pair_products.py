"""Products of chosen rows of two matrices, by backend: each pair's dot product, and sums of rows.

They are what a head over sets costs: D multiplications per pair of a token and an id of its set.
P pairs, D columns.
"""

import torch
from torch import Tensor

from . import _native
from ._torch import pair_products as torch_pairs


def pair_dots(
    impl: str, left: Tensor, right: Tensor, i_P: Tensor, j_P: Tensor, keep_P: Tensor | None = None
) -> Tensor:
    """left[i] . right[j] of each pair, fp32 [P], summed in fp32.

    left, right: [*, D] of one dtype; i_P, j_P: int64. Pairs where `keep_P`, bool [P], is false are
    0; their rows are not read.
    """
    if impl in ("triton", "cuda"):
        from ._triton.pair_products import launch

        return launch.pair_dots(left, right, i_P, j_P, keep_P)
    dots = _native.pair_dots if impl == "cpu" else torch_pairs.pair_dots
    if keep_P is None:
        return dots(left, right, i_P, j_P)
    at = keep_P.nonzero().squeeze(1)
    out_P = torch.zeros(len(i_P), device=left.device)
    return out_P.index_copy_(0, at, dots(left, right, i_P[at], j_P[at]))


def pair_sums(
    impl: str,
    scale_P: Tensor,
    rows: Tensor,
    i_P: Tensor,
    place_P: Tensor,
    out: Tensor,
    add: bool = False,
) -> None:
    """Writes to, or adds to, out[place] the sum of scale * rows[i] over the pairs of each place.

    scale_P: fp32; rows: [*, D]; place_P: int64, ascending; out: [*, D] of any dtype. Sums are fp32
    in a fixed order, rounded once. Pairs of scale 0 are not read, nor is a place of them written.
    """
    if impl in ("triton", "cuda"):
        from ._triton.pair_products import launch

        launch.pair_sums(scale_P, rows, i_P, place_P, out, add)
        return
    sums = _native.pair_sums if impl == "cpu" else torch_pairs.pair_sums
    sums(scale_P, rows, i_P, place_P, out, add)
