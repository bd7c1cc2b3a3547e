"""Products of chosen rows of two matrices, in blocks of gathered rows.

P pairs, S distinct places, D columns.
"""

import torch
from torch import Tensor

# Elements of one block of gathered rows, fp32.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}
# Terms that one fp32 sum takes in a row; sums of blocks are added to each other.
_TERMS = 2048
_products = 0


def products() -> int:
    """Multiplications so far, which `torch` does not count: half their flops."""
    return _products


def _count(more: int) -> None:
    global _products
    _products += more


def _pairs_per_block(rows: Tensor) -> int:
    block = _BLOCK["cuda" if rows.is_cuda else "cpu"]
    return max(1, min(_TERMS, block // max(rows.shape[1], 1)))


def pair_dots(left: Tensor, right: Tensor, i_P: Tensor, j_P: Tensor) -> Tensor:
    """left[i] . right[j] of each pair, fp32 [P]."""
    _count(i_P.numel() * left.shape[1])
    block = _pairs_per_block(left)
    parts = [
        (left[i].float() * right[j].float()).sum(1)
        for i, j in zip(i_P.split(block), j_P.split(block), strict=True)
    ]
    return torch.cat(parts) if parts else left.new_empty(0, dtype=torch.float32)


def pair_sums(
    scale_P: Tensor, rows: Tensor, i_P: Tensor, place_P: Tensor, out: Tensor, add: bool
) -> None:
    """Writes to, or adds to, out[place] the sum of scale * rows[i]; see `_pair_products`."""
    at = (scale_P != 0).nonzero().squeeze(1)
    scale_P, i_P, place_P = scale_P[at], i_P[at], place_P[at]
    _count(i_P.numel() * rows.shape[1])
    place_S, size_S = place_P.unique_consecutive(return_counts=True)
    sums_SD = torch.zeros(len(place_S), rows.shape[1], device=rows.device)
    run_P = torch.arange(len(place_S), device=rows.device).repeat_interleave(size_S)
    block = _pairs_per_block(rows)
    for scale, i, run in zip(*(x.split(block) for x in (scale_P, i_P, run_P)), strict=True):
        found, sizes = run.unique_consecutive(return_counts=True)
        weighted = rows[i].float() * scale.unsqueeze(1)
        sums_SD[found] += torch.segment_reduce(weighted, "sum", lengths=sizes, unsafe=True)
    if add:
        sums_SD += out[place_S]
    out[place_S] = sums_SD.to(out.dtype)
