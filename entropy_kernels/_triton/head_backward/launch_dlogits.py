"""dz of compact rows and a chunk of columns: which kernel computes it, and its launch.

C compact rows, D hidden, V vocabulary, N columns of a chunk.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from ... import device
from ..common import products
from ..common.tiles import Tile
from ..head_forward import launch_store as kept_rows
from ..head_forward.launch_store import KeptRows
from .dlogits_kernels import dlogits_pointer, dlogits_read, dlogits_tma
from .row_kernels import CompactRows

# Rows and columns of a tile where the logits are read, not recomputed.
BLOCK_READ = (16, 256)


class Chunk(NamedTuple):
    """Columns [start, stop) of the vocabulary, and where their gradient goes.

    dz: [C, at least N], rows of dense columns. Rows beyond the number of active ones keep what
        they hold: zeros.
    bias_partials: fp32 [n_partials, the same columns], zeros at first, or None where the bias needs
        none.
    """

    start: int
    stop: int
    dz: Tensor
    bias_partials: Tensor | None


class Dlogits(NamedTuple):
    """What every chunk of one backward has in common.

    Rows that `kept` tells are read from `logits`; the others are recomputed by `tile`. It is None
    where there are none, and so is `kept`.
    """

    rows: CompactRows
    weight_VD: Tensor
    bias_V: Tensor | None
    logits: Tensor
    kept: KeptRows | None
    softcap: float | None
    has_entropy: bool
    tile: Tile | None

    @property
    def n_partials(self) -> int:
        """Blocks of rows, each of which sums the gradient of the bias: first of those read."""
        blocks = self._blocks_read
        if self.tile is not None:
            blocks += triton.cdiv(self.rows.hidden.shape[0], self.tile.block_t)
        return blocks

    @property
    def _blocks_read(self) -> int:
        return 0 if self.kept is None else triton.cdiv(self.rows.hidden.shape[0], BLOCK_READ[0])

    def write(self, chunk: Chunk) -> None:
        """dz of the columns of `chunk`."""
        flags = {
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_ENTROPY": self.has_entropy,
            "NEEDS_BIAS": chunk.bias_partials is not None,
        }
        if self.kept is not None:
            self._read(chunk, self.kept, flags)
        if self.tile is None:
            return
        assert self.kept is None or kept_rows.STEP % self.tile.block_t == 0
        capacity, hidden = self.rows.hidden.shape
        known = 0 if self.kept is None else self.kept.known
        products.count((capacity - known) * hidden * (chunk.stop - chunk.start))
        if chunk.bias_partials is not None:
            chunk = chunk._replace(bias_partials=chunk.bias_partials[self._blocks_read :])
        if self.tile.variant == "pointer":
            self._from_pointers(chunk, self.tile, flags)
        else:
            self._from_descriptors(chunk, self.tile, flags)

    def _recomputed(self, chunk: Chunk) -> tuple[Any, ...]:
        rows, first = self.rows, None if self.kept is None else self.kept.number
        return rows.fields, rows.target, first, rows.active.number, chunk.dz, chunk.bias_partials

    def _read(self, chunk: Chunk, kept: KeptRows, flags: dict[str, bool]) -> None:
        block_c, block_v = BLOCK_READ
        capacity = self.rows.hidden.shape[0]
        blocks_v = triton.cdiv(chunk.stop - chunk.start, block_v)
        dlogits_read[(triton.cdiv(capacity, block_c) * blocks_v,)](
            self.logits,
            kept.place,
            self.rows.fields,
            self.rows.target,
            kept.number,
            chunk.dz,
            chunk.bias_partials,
            chunk.dz.stride(0),
            capacity,
            self.logits.shape[1],
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
            *self._recomputed(chunk),
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
        dlogits_tma[(min(n_tiles, device.processors(self.weight_VD.device)) if persistent else n_tiles,)](
            TensorDescriptor.from_tensor(self.rows.hidden, [tile.block_t, tile.block_d]),
            TensorDescriptor.from_tensor(self.weight_VD, [tile.block_v, tile.block_d]),
            self.bias_V,
            *self._recomputed(chunk),
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
            "HAS_FIRST": self.kept is not None,
            "HAS_BIAS": self.bias_V is not None,
            "UPCAST": device.interpreting(),
            "BLOCK_C": tile.block_t,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "GROUP_C": tile.group_t,
            **tile.options,
        }
