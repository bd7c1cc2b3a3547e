"""dz of compact rows and a chunk of columns: which kernel computes it, and its launch.

C compact rows, D hidden, V vocabulary, N columns of a chunk.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from entropy_kernels._triton import products
from entropy_kernels._triton import target as gpu
from entropy_kernels._triton.compact_rows import CompactRows
from entropy_kernels._triton.dlogits_kernels import dlogits_pointer, dlogits_read, dlogits_tma
from entropy_kernels._triton.tiles import Tile

# Rows and columns of a tile where the logits are read, not recomputed.
BLOCK_READ = (16, 256)


class Chunk(NamedTuple):
    """Columns [start, stop) of the vocabulary, and where their gradient goes.

    dz: [C, at least N], rows of dense columns. Rows beyond the number of active ones keep what
        they hold: zeros.
    bias_partials: fp32 [blocks of rows, the same columns], or None where the bias needs none.
    """

    start: int
    stop: int
    dz: Tensor
    bias_partials: Tensor | None


class Dlogits(NamedTuple):
    """What every chunk of one backward has in common; `tile` is None where logits are read."""

    rows: CompactRows
    weight_VD: Tensor
    bias_V: Tensor | None
    logits_TV: Tensor
    softcap: float | None
    has_entropy: bool
    tile: Tile | None

    @property
    def block_rows(self) -> int:
        """Rows whose bias gradients one partial sums."""
        return BLOCK_READ[0] if self.tile is None else self.tile.block_t

    def write(self, chunk: Chunk) -> None:
        """dz of the columns of `chunk`."""
        flags = {
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_ENTROPY": self.has_entropy,
            "NEEDS_BIAS": chunk.bias_partials is not None,
        }
        if self.tile is not None:
            products.count(self.rows.hidden.numel() * (chunk.stop - chunk.start))
        if self.tile is None:
            self._read(chunk, flags)
        elif self.tile.variant == "pointer":
            self._from_pointers(chunk, self.tile, flags)
        else:
            self._from_descriptors(chunk, self.tile, flags)

    def _tail(self, chunk: Chunk) -> tuple[Any, ...]:
        rows = self.rows
        return rows.fields, rows.target, rows.active.number, chunk.dz, chunk.bias_partials

    def _read(self, chunk: Chunk, flags: dict[str, bool]) -> None:
        block_c, block_v = BLOCK_READ
        capacity = self.rows.hidden.shape[0]
        blocks_v = triton.cdiv(chunk.stop - chunk.start, block_v)
        dlogits_read[(triton.cdiv(capacity, block_c) * blocks_v,)](
            self.logits_TV,
            self.rows.active.rows,
            *self._tail(chunk),
            chunk.dz.stride(0),
            capacity,
            self.logits_TV.shape[1],
            chunk.start,
            chunk.stop,
            self.softcap or 0.0,
            **flags,
            BLOCK_C=block_c,
            BLOCK_V=block_v,
            num_warps=4,
        )

    def _from_pointers(self, chunk: Chunk, tile: Tile, flags: dict[str, bool]) -> None:
        capacity, hidden = self.rows.hidden.shape
        blocks_v = triton.cdiv(chunk.stop - chunk.start, tile.block_v)
        dlogits_pointer[(triton.cdiv(capacity, tile.block_t) * blocks_v,)](
            self.rows.hidden,
            self.weight_VD,
            self.bias_V,
            *self._tail(chunk),
            *self.weight_VD.stride(),
            chunk.dz.stride(0),
            capacity,
            hidden,
            chunk.start,
            chunk.stop,
            self.softcap or 0.0,
            **flags,
            **self._constants(tile),
            EVEN_D=hidden % tile.block_d == 0,
        )

    def _from_descriptors(self, chunk: Chunk, tile: Tile, flags: dict[str, bool]) -> None:
        # Not everywhere that Triton is.
        from triton.tools.tensor_descriptor import TensorDescriptor

        capacity, hidden = self.rows.hidden.shape
        blocks_v = triton.cdiv(chunk.stop - chunk.start, tile.block_v)
        n_tiles = triton.cdiv(capacity, tile.block_t) * blocks_v
        persistent = tile.variant == "tma"
        dlogits_tma[(min(n_tiles, gpu.processors(self.weight_VD)) if persistent else n_tiles,)](
            TensorDescriptor.from_tensor(self.rows.hidden, [tile.block_t, tile.block_d]),
            TensorDescriptor.from_tensor(self.weight_VD, [tile.block_v, tile.block_d]),
            self.bias_V,
            *self._tail(chunk),
            chunk.dz.stride(0),
            capacity,
            hidden,
            chunk.start,
            chunk.stop,
            self.softcap or 0.0,
            **flags,
            **self._constants(tile),
            FLATTEN=persistent,
        )

    def _constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "HAS_BIAS": self.bias_V is not None,
            "UPCAST": gpu.interpreting(),
            "BLOCK_C": tile.block_t,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "GROUP_C": tile.group_t,
            **tile.options,
        }
