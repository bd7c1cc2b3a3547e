"""Log-probability and entropy of every row: which kernel computes the statistics, and its launch.

Each program sums a block of rows over a split of the vocabulary, into four fp32 partials a row
and split (row_statistics.py), with moments seven (moments.py); one more kernel merges the splits.
No atomics: same bits every time. Beyond its results a call allocates 4 T (4 S + 1) bytes, with
moments 4 T (7 S + 1), and the variant "cublas" a workspace of about WORKSPACE_BYTES. That variant
alone has whole rows of logits at hand, so only it can keep those of some rows for backward.

T tokens, D hidden, V vocabulary, S vocabulary splits.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import device
from ..._rows import ForwardRows, per_row
from ..common import products, tiles
from ..common.tiles import Tile
from .cublas_kernel import forward_cublas
from .launch_store import Keeping
from .pointer_kernel import forward_pointer
from .row_sum_functions import merge
from .target_logit_kernel import target_logits
from .tma_kernel import forward_tma

# fp32 logits of as many rows as fit, at least one block of them.
WORKSPACE_BYTES = 1 << 29
_WORKSPACE_BLOCK = 128
# Rows of one program that merges splits, and splits.
_MERGE_BLOCK = (32, 16)


class _Head(NamedTuple):
    """The inputs of all kernels, where moments go if they are wanted, and S."""

    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    bias_V: Tensor | None
    temperature_T: Tensor | None
    softcap: float | None
    moments: Tensor | None
    n_split: int
    tiles_per_split: int


def linear_logprob_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    keep_logits: bool,
    *,
    moments: Tensor | None = None,
    keep_above: Tensor | None = None,
    keep_rows: int = 0,
    variant: str | None = None,
    tile: Tile | None = None,
) -> ForwardRows:
    """The statistics of every row; zeros where the target is `ignore_index`.

    Ignored rows are computed, then zeroed: their number never reaches the host. `variant` and
    `tile` overrule the table, for tests and tuning; a variant that cannot run here is an error.

    moments: fp32 [4, T], contiguous, to be filled with what _rows.STATISTICS names.
    keep_above, keep_rows: keeps the logits [keep_rows, V] of the first rows that are not ignored
        and whose entropy is at least keep_above, fp32 [], by the variant "cublas".
    """
    count, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    logits_TV = _empty((count, vocabulary) if keep_logits else (0,), hidden_TD)
    # Five tensors: an op's outputs are not views of one.
    found = [_empty((count,), hidden_TD) for _ in range(5)]
    if count == 0:
        return ForwardRows._make([*found, logits_TV, None])

    if tile is None:
        more, rows = moments is not None, keep_above is not None
        tile = _choose(hidden_TD, weight_VD, softcap, keep_logits, more, rows, variant)
    if keep_above is not None and tile.variant != "cublas":
        raise ValueError(f'keep_above needs the variant "cublas"; got {tile.variant!r}')
    keeping = Keeping.room(keep_above, keep_rows, count, vocabulary)
    n_split, tiles_per_split = _splits(tile, count, vocabulary, device.processors(hidden_TD.device))
    head = _Head(
        hidden_TD,
        weight_VD,
        target_T.contiguous(),
        None if bias_V is None else bias_V.contiguous(),
        per_row(temperature, target_T),
        softcap,
        moments,
        n_split,
        tiles_per_split,
    )
    partials = _empty((4 if moments is None else 7, n_split, count), hidden_TD)
    target_logit_T = _empty((count,), hidden_TD)
    merge_rows = partial(_merge, head, partials, target_logit_T, ignore_index, found)
    with device.on(hidden_TD.device):
        if tile.variant == "cublas":
            for z_TV, start in _from_products(head, tile, partials, target_logit_T, logits_TV):
                merge_rows(start, start + z_TV.shape[0])
                if keeping is not None:
                    keeping.take(z_TV, start, found[1], head.target_T, ignore_index)
        else:
            products.count(hidden_TD.numel() * vocabulary)
            if tile.variant == "pointer":
                _from_pointers(head, tile, partials, logits_TV)
            else:
                _from_descriptors(head, tile, partials)
            target_logits(*head[:4], softcap, tile, target_logit_T)
            merge_rows(0, count)
    if keeping is not None:
        return ForwardRows._make([*found, keeping.logits, keeping.places])
    return ForwardRows._make([*found, logits_TV, None])


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _choose(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    softcap: float | None,
    keep_logits: bool,
    moments: bool,
    keep_rows: bool,
    variant: str | None,
) -> Tile:
    arch = device.architecture(hidden_TD.device)
    usable = tiles.variants(arch, hidden_TD, weight_VD)
    if keep_logits:
        usable -= {*tiles.TMA}
    if moments:
        # Of its registers with seven sums nothing is known: Triton 3.6 alone has it.
        usable -= {"tma_ws"}
    if keep_rows:
        usable &= {"cublas"}
    if variant is not None:
        if variant not in usable:
            raise ValueError(f"variant must be one of {sorted(usable)} here; got {variant!r}")
        usable = {variant}
    count, hidden = hidden_TD.shape
    op = "forward" + "_keep" * keep_rows + "_statistics" * moments
    op += "_softcap" * (softcap is not None)
    return tiles.lookup(op, arch, hidden_TD.dtype, hidden, count, usable)


def _splits(tile: Tile, count: int, vocabulary: int, processors: int) -> tuple[int, int]:
    """How many splits, and blocks of columns in each: what keeps all processors busy longest.

    Of equally good ones the fewest splits: they are read again. Specialised warps cannot carry
    statistics from one block of columns to the next.
    """
    blocks_t, blocks_v = triton.cdiv(count, tile.block_t), triton.cdiv(vocabulary, tile.block_v)

    def steps(per_split: int) -> int:
        units = blocks_t * triton.cdiv(blocks_v, per_split)
        return triton.cdiv(units, processors) * per_split

    most = 1 if tile.variant == "tma_ws" else max(tile.split_v // tile.block_v, 1)
    sizes = range(min(most, blocks_v), 0, -1)
    per_split = min(sizes, key=steps)
    return triton.cdiv(blocks_v, per_split), per_split


def _flags(head: _Head) -> dict[str, bool]:
    return {
        "HAS_BIAS": head.bias_V is not None,
        "HAS_TEMPERATURE": head.temperature_T is not None,
        "HAS_SOFTCAP": head.softcap is not None,
    }


def _stride(temperature_T: Tensor | None) -> int:
    return 0 if temperature_T is None else temperature_T.stride(0)


def _from_pointers(head: _Head, tile: Tile, partials: Tensor, logits_TV: Tensor) -> None:
    (count, hidden), vocabulary = head.hidden_TD.shape, head.weight_VD.shape[0]
    forward_pointer[(triton.cdiv(count, tile.block_t) * head.n_split,)](
        head.hidden_TD,
        head.weight_VD,
        head.bias_V,
        head.temperature_T,
        partials,
        logits_TV,
        *head.hidden_TD.stride(),
        *head.weight_VD.stride(),
        _stride(head.temperature_T),
        count,
        hidden,
        vocabulary,
        head.n_split,
        head.softcap or 0.0,
        **_flags(head),
        MOMENTS=head.moments is not None,
        KEEP_LOGITS=logits_TV.numel() > 0,
        EVEN_D=hidden % tile.block_d == 0,
        UPCAST=device.interpreting(),
        BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v,
        BLOCK_D=tile.block_d,
        TILES=head.tiles_per_split,
        GROUP_T=tile.group_t,
        **tile.options,
    )


def _from_descriptors(head: _Head, tile: Tile, partials: Tensor) -> None:
    # Not everywhere that Triton is.
    from triton.tools.tensor_descriptor import TensorDescriptor

    (count, hidden), vocabulary = head.hidden_TD.shape, head.weight_VD.shape[0]
    units = triton.cdiv(count, tile.block_t) * head.n_split
    programs = min(units, device.processors(head.hidden_TD.device))
    forward_tma[(units if tile.variant == "tma_split" else programs,)](
        TensorDescriptor.from_tensor(head.hidden_TD, [tile.block_t, tile.block_d]),
        TensorDescriptor.from_tensor(head.weight_VD, [tile.block_v, tile.block_d]),
        head.bias_V,
        head.temperature_T,
        partials,
        _stride(head.temperature_T),
        count,
        hidden,
        vocabulary,
        head.n_split,
        head.softcap or 0.0,
        **_flags(head),
        MOMENTS=head.moments is not None,
        UPCAST=device.interpreting(),
        BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v,
        BLOCK_D=tile.block_d,
        TILES=head.tiles_per_split,
        GROUP_T=tile.group_t,
        FLATTEN=tile.variant == "tma",
        WARP_SPECIALIZE=tile.variant == "tma_ws",
        **tile.options,
    )


def _from_products(
    head: _Head, tile: Tile, partials: Tensor, target_logit_T: Tensor, logits_TV: Tensor
) -> Iterator[tuple[Tensor, int]]:
    """The logits of each chunk of rows and its first row, once its partials are there.

    They are valid until the next chunk.
    """
    count, vocabulary = head.hidden_TD.shape[0], head.weight_VD.shape[0]
    flags = _flags(head)
    del flags["HAS_BIAS"]
    fitting = WORKSPACE_BYTES // (4 * vocabulary) // _WORKSPACE_BLOCK * _WORKSPACE_BLOCK
    rows = min(max(fitting, _WORKSPACE_BLOCK), count)
    kept = logits_TV.numel() > 0
    workspace = logits_TV if kept else partials.new_empty(rows, vocabulary)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        z = workspace[start:end] if kept else workspace[: end - start]
        products.mm(head.hidden_TD[start:end], head.weight_VD.T, out=z)
        if head.bias_V is not None:
            z += head.bias_V
        forward_cublas[(triton.cdiv(end - start, tile.block_t) * head.n_split,)](
            z,
            head.target_T,
            head.temperature_T,
            partials,
            target_logit_T,
            _stride(head.temperature_T),
            start,
            end,
            count,
            vocabulary,
            head.n_split,
            head.softcap or 0.0,
            **flags,
            MOMENTS=head.moments is not None,
            BLOCK_T=tile.block_t,
            BLOCK_V=tile.block_v,
            TILES=head.tiles_per_split,
            **tile.options,
        )
        yield z, start


def _merge(
    head: _Head,
    partials: Tensor,
    target_logit_T: Tensor,
    ignore_index: int,
    found: list[Tensor],
    start: int,
    stop: int,
) -> None:
    count, vocabulary = head.hidden_TD.shape[0], head.weight_VD.shape[0]
    block_t, block_s = _MERGE_BLOCK
    merge[(triton.cdiv(stop - start, block_t),)](
        partials,
        target_logit_T,
        head.target_T,
        head.temperature_T,
        *found,
        head.moments,
        _stride(head.temperature_T),
        start,
        stop,
        count,
        vocabulary,
        head.n_split,
        ignore_index,
        HAS_TEMPERATURE=head.temperature_T is not None,
        MOMENTS=head.moments is not None,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        num_warps=4,
    )
