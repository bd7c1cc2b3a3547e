"""Log-probability and entropy of every row: which kernel sums them, and in which order they run.

Each program sums a block of rows over a split of the vocabulary, into four fp32 partials per row
and split (row_sum_functions.py), with statistics nine (statistics_functions.py). One more kernel
merges the splits. Nothing is atomic: a call gives the same bits every time.

A call allocates its results and 4 T (4 S + 1) bytes, with statistics 4 T (9 S + 1). To that the
variant "cublas" adds a workspace of about WORKSPACE_BYTES, and the others the rows that have a
target (launch_valid.py). "cublas" alone has whole rows of logits at hand, so only it can store
those of some rows for backward.

T tokens, D hidden, V vocabulary, S vocabulary splits.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ... import device
from ..._cuda_kernels import head as cuda_head
from ..._rows import FILLED_BY_CSRC_CUDA, ForwardRows
from ...head import Head
from ..common import choice, cutlass, products, tiles
from ..common.tiles import Tile
from .launch_store import LogitStore
from .launch_valid import valid_rows
from .launch_variants import (
    Work,
    chunks_of_logits,
    from_cutlass,
    from_descriptors,
    from_pointers,
    merge,
    target_logits,
)

# Steps of a forward, of the fewest possible.
TOLERANCE = 1.01


def forward(
    head: Head,
    *,
    keep_logits: bool,
    store_above: Tensor | None = None,
    store_rows: int = 0,
    statistics: Tensor | None = None,
    variant: str | None = None,
    tile: Tile | None = None,
    per_split: int | None = None,
    chunk_rows: int | None = None,
    refused: Callable[[Tile], bool] | None = None,
    impl: str = "triton",
) -> ForwardRows:
    """What backward and the caller need of every row; zeros where the target is ignored.

    Ignored rows have no part in a product, but those of cuBLAS. Their number never reaches the
    host. `variant` and `tile` overrule the table, for tests and tuning; a variant that cannot run
    here is an error.

    keep_logits: stores the logits of all rows.
    store_above, store_rows: the variant "cublas" stores the logits [store_rows, V] of the first
        valid rows whose entropy is at least store_above, fp32 [].
    statistics: fp32 [6, T], contiguous; filled with what _rows.STATISTICS names. With impl="cuda"
        or a tile of csrc/cuda it may be [4, T], for what that fills.
    per_split: blocks of columns in each split, for tests; by default `splits` chooses.
    chunk_rows: rows of logits that "cublas" has at a time, for tests.
    refused: which tiles are known to be wrong here. One is taken only if there is no other.
    impl: "cuda" takes the tiles of csrc/cuda first, and tells once why it cannot.
    """
    (count, _), vocabulary = head.hidden.shape, head.weight.shape[0]
    logits = _empty((count, vocabulary) if keep_logits else (0,), head.hidden)
    # Five tensors: an op's outputs are not views of one.
    rows = ForwardRows._make([*(_empty((count,), head.hidden) for _ in range(5)), logits, None])
    if statistics is not None:
        assert statistics.dtype == torch.float32
        assert statistics.is_contiguous()
        assert statistics.shape in ((4, count), (6, count))  # what csrc/cuda and merge_kernel fill
    if count == 0:
        return rows

    if tile is None:
        found = preferred(
            head,
            keep_logits=keep_logits,
            stores_rows=store_above is not None,
            statistics=0 if statistics is None else len(statistics),
            impl=impl,
        )
        tile = choice.first(_of_variant(found, variant), refused)
        if impl == "cuda":
            choice.tell_of_triton("forward", tile, head, store_above is not None, statistics)
    if store_above is not None and tile.variant != "cublas":
        raise ValueError(f'store_above needs the variant "cublas"; got {tile.variant!r}')
    store = LogitStore.room(store_above, store_rows, count, vocabulary)
    if per_split is None:
        _, per_split = splits(tile, count, vocabulary, device.processors(head.hidden.device))
    n_split = triton.cdiv(vocabulary, tile.block_v * per_split)
    filled, fields = statistics, 9
    if statistics is not None and tile.variant != cutlass.VARIANT and len(statistics) == 4:
        filled = _empty((6, count), head.hidden)
    if tile.variant == cutlass.VARIANT:
        fields = 7
        n_split = cuda_head.splits(cutlass.block(head.hidden.device, tile), vocabulary)
    work = Work(
        head,
        tile,
        n_split,
        per_split,
        target_T=head.target.contiguous(),
        bias_V=None if head.bias is None else head.bias.contiguous(),
        temperature_T=head.temperature_T,
        partials=_empty((4 if statistics is None else fields, n_split, count), head.hidden),
        target_logit_T=_empty((count,), head.hidden),
        rows=rows,
        statistics=filled,
        valid=None,
    )
    with device.on(head.hidden.device):
        if tile.variant == "cublas":
            for z_TV, start in chunks_of_logits(work, chunk_rows):
                merge(work, start, start + z_TV.shape[0])
                if store is not None:
                    store.take(z_TV, start, rows.entropy, work.target_T, head.ignore_index)
        else:
            valid = valid_rows(head, work.target_T)
            products.count(valid.numbered.number, head.hidden.shape[1] * vocabulary)
            if tile.variant == cutlass.VARIANT:
                from_cutlass(work, valid)
            else:
                launch = from_pointers if tile.variant == "pointer" else from_descriptors
                launch(work, valid)
                target_logits(work, valid)
            merge(work._replace(valid=valid), 0, count)
        if filled is not None and statistics is not None and filled is not statistics:
            statistics.copy_(filled[: len(statistics)])
    return rows if store is None else rows._replace(logits=store.logits, places=store.places)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def preferred(
    head: Head,
    *,
    keep_logits: bool = False,
    stores_rows: bool = False,
    statistics: int = 0,
    impl: str = "triton",
) -> tuple[Tile, ...]:
    """The tiles that can run such a forward of `head`, the table's first choice first.

    statistics: rows of them.
    """
    arch = device.architecture(head.hidden.device)
    usable = tiles.variants(arch, head.hidden, head.weight)
    count, hidden = head.hidden.shape
    if impl == "cuda" and statistics <= FILLED_BY_CSRC_CUDA:
        usable |= cutlass.variants("forward", arch, head.hidden.dtype, hidden, head.weight)
    return choice.forward_row(
        (arch, head.hidden.dtype, hidden, count, usable),
        keep_logits=keep_logits,
        stores_rows=stores_rows,
        statistics=statistics > 0,
        softcap=head.softcap is not None,
    )


def _of_variant(found: tuple[Tile, ...], variant: str | None) -> tuple[Tile, ...]:
    if fitting := tuple(tile for tile in found if variant in (None, tile.variant)):
        return fitting
    names = sorted({tile.variant for tile in found})
    raise ValueError(f"variant must be one of {names} here; got {variant!r}")


def splits(tile: Tile, count: int, vocabulary: int, processors: int) -> tuple[int, int]:
    """How many splits keep all processors busy longest, and blocks of columns in each split.

    Splits are read again, so the largest within TOLERANCE of the best is taken. Kernels are
    compiled for the blocks of a split: only powers of two are, at most five of them. Specialised
    warps and "cutlass" cannot carry sums from one block of columns to the next.
    """
    blocks_t, blocks_v = triton.cdiv(count, tile.block_t), triton.cdiv(vocabulary, tile.block_v)

    def steps(per_split: int) -> int:
        units = blocks_t * triton.cdiv(blocks_v, per_split)
        return triton.cdiv(units, processors) * per_split

    most = (
        1 if tile.variant in ("tma_ws", cutlass.VARIANT) else max(tile.split_v // tile.block_v, 1)
    )
    sizes = [1 << i for i in range(min(most, blocks_v).bit_length())]
    enough = TOLERANCE * min(map(steps, sizes))
    per_split = max(size for size in sizes if steps(size) <= enough)
    return triton.cdiv(blocks_v, per_split), per_split
