"""The two products of a head over given sets: of the pairs of a token and an id of its set.

Neither waits for the device: which pairs are live and where runs end is known there alone. Nothing
is atomic: a call gives the same bits every time.

P pairs, D hidden.
"""

import torch
import triton
from torch import Tensor

from ... import device
from ..common import products
from .kernels import dots_kernel, merge_sums_kernel, sums_kernel

# Pairs and columns of one step of a program; fewer columns, more pairs.
DOTS_P, DOTS_D = 8, 256
SUMS_P, SUMS_D = 8, 512
MOST_P = 64
# Parts of one step of a program that merges.
MERGE_C = 16
# Pairs of a chunk at least, and chunks at most: each has two rows of partial sums.
CHUNK, MAX_CHUNKS = 64, 4096


def pair_dots(
    left: Tensor, right: Tensor, i_P: Tensor, j_P: Tensor, keep_P: Tensor | None
) -> Tensor:
    """left[i] . right[j] of each pair, fp32 [P]; 0 where keep is false, whose rows are not read.

    One launch reads 2 D numbers per kept pair; those of a row of left that neighbours share come
    from a cache.

    left, right: [*, D], fp32, bf16 or fp16.
    i_P, j_P: int64 or int32 [P].
    """
    count, hidden = i_P.numel(), left.shape[1]
    out_P = torch.empty(count, dtype=torch.float32, device=left.device)
    _count(keep_P, out_P, hidden)
    if count == 0:
        return out_P
    block_d, block_p = _blocks(hidden, DOTS_D, DOTS_P)
    with device.on(left.device):
        dots_kernel[(triton.cdiv(count, block_p),)](
            left,
            right,
            i_P.contiguous(),
            j_P.contiguous(),
            None if keep_P is None else keep_P.contiguous().view(torch.uint8),
            out_P,
            *left.stride(),
            *right.stride(),
            count,
            hidden,
            HAS_KEEP=keep_P is not None,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out_P


def pair_sums(
    scale_P: Tensor, rows: Tensor, i_P: Tensor, place_P: Tensor, out: Tensor, add: bool
) -> None:
    """out[place] = the sum of scale rows[i] over each run of equal places, or += with `add`.

    Sums are in fp32 and rounded once. Pairs of scale 0 are not read, and a run of them alone is not
    written. A launch takes chunks of pairs, and a second merges the runs that several chunks have.
    So no run is one program's alone. Beside out it allocates 8 D bytes per chunk.

    scale_P: fp32 [P].
    rows, out: [*, D], fp32, bf16 or fp16, each its own.
    i_P, place_P: int64 or int32 [P]; places ascend and are not negative.
    """
    count, hidden = scale_P.numel(), rows.shape[1]
    if products.counting():
        _count(scale_P != 0, scale_P, hidden)
    if count == 0 or hidden == 0:
        return
    chunk = CHUNK * triton.cdiv(count, CHUNK * MAX_CHUNKS)
    chunks = triton.cdiv(count, chunk)
    block_d, block_p = _blocks(hidden, SUMS_D, SUMS_P)
    partials = torch.empty(chunks, 2, hidden, dtype=torch.float32, device=out.device)
    live = torch.empty(chunks, 2, dtype=torch.int32, device=out.device)
    place_P = place_P.contiguous()
    grid = chunks, triton.cdiv(hidden, block_d)
    with device.on(out.device):
        sums_kernel[grid](
            scale_P.contiguous(),
            rows,
            i_P.contiguous(),
            place_P,
            out,
            partials,
            live,
            *rows.stride(),
            *out.stride(),
            count,
            hidden,
            chunk,
            ADD=add,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if chunks > 1:
            merge_sums_kernel[grid](
                place_P,
                partials,
                live,
                out,
                *out.stride(),
                count,
                hidden,
                chunk,
                ADD=add,
                BLOCK_C=MERGE_C,
                BLOCK_D=block_d,
                num_warps=4,
                enable_fp_fusion=True,
            )


def _blocks(hidden: int, most_d: int, least_p: int) -> tuple[int, int]:
    """Columns and pairs of one step: about as many numbers, whatever D."""
    block_d = min(most_d, triton.next_power_of_2(max(hidden, 1)))
    return block_d, min(MOST_P, least_p * most_d // block_d)


def _count(live_P: Tensor | None, like_P: Tensor, hidden: int) -> None:
    """Counts the multiplications of live pairs, or of all; a sum is launched only for a count."""
    if products.counting():
        live = torch.ones_like(like_P, dtype=torch.bool) if live_P is None else live_P
        products.count(live.sum(), hidden)
