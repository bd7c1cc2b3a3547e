"""The launches that write dz for compact rows and a chunk of columns.

C compact rows, D hidden, V vocabulary, N columns of a chunk.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from ... import device
from ..._cuda_kernels import head as cuda_head
from ..common import cutlass, products
from ..common.tiles import READ, Tile, on
from . import launch_rows
from .dlogits_kernels import dlogits_pointer_kernel, dlogits_read_kernel, dlogits_tma_kernel
from .launch_rows import CompactRows, StoredRows


class Chunk(NamedTuple):
    """Columns [start, stop) of the vocabulary, and where their gradient goes.

    dz: [C, at least N], rows of dense columns. Rows beyond the active ones hold zeros and are not
        written.
    bias_partials: fp32 [n_partials, the same columns], zeros at first; None where the bias needs no
        gradient.
    """

    start: int
    stop: int
    dz: Tensor
    bias_partials: Tensor | None


class Dlogits(NamedTuple):
    """What all chunks of one backward have in common.

    The rows of `stored` are read from `logits`, the others are recomputed by `tile`; each is None
    where it has no rows.
    """

    rows: CompactRows
    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logits: Tensor
    stored: StoredRows | None
    has_entropy: bool
    tile: Tile | None

    @property
    def n_partials(self) -> int:
        """Blocks of rows that each sum the bias's gradient, first the blocks that are read."""
        blocks = self._blocks_read
        if self.tile is not None:
            of_cuda = self.tile.variant == cutlass.VARIANT
            rows = cuda_head.bias_rows() if of_cuda else self.tile.block_t
            blocks += triton.cdiv(self.rows.hidden.shape[0], rows)
        return blocks

    @property
    def _blocks_read(self) -> int:
        return 0 if self.stored is None else triton.cdiv(self.rows.hidden.shape[0], READ.block_t)

    def write(self, chunk: Chunk) -> None:
        """dz of the columns of `chunk`."""
        if self.stored is not None:
            self._read(chunk, self.stored)
        if self.tile is None:
            return
        assert self.stored is None or launch_rows.STEP % self.tile.block_t == 0
        hidden = self.rows.hidden.shape[1]
        first = None if self.stored is None else self.stored.number
        products.count(self.rows.active.number, hidden * (chunk.stop - chunk.start), first)
        if chunk.bias_partials is not None:
            chunk = chunk._replace(bias_partials=chunk.bias_partials[self._blocks_read :])
        launches = {"pointer": self._from_pointers, cutlass.VARIANT: self._from_cutlass}
        launches.get(self.tile.variant, self._from_descriptors)(chunk, self.tile)

    def _read(self, chunk: Chunk, stored: StoredRows) -> None:
        tile = on(device.architecture(self.logits.device), READ)
        capacity = self.rows.hidden.shape[0]
        blocks_v = triton.cdiv(chunk.stop - chunk.start, tile.block_v)
        dlogits_read_kernel[(triton.cdiv(capacity, tile.block_t) * blocks_v,)](
            self.logits,
            stored.place,
            self.bias_V,
            self.rows.fields,
            self.rows.target,
            stored.number,
            chunk.dz,
            chunk.bias_partials,
            chunk.dz.stride(0),
            capacity,
            self.logits.shape[1],
            chunk.start,
            chunk.stop,
            self.softcap or 0.0,
            **self._flags(chunk),
            BLOCK_C=tile.block_t,
            BLOCK_V=tile.block_v,
            **tile.options,
        )

    def _from_pointers(self, chunk: Chunk, tile: Tile) -> None:
        capacity, hidden = self.rows.hidden.shape
        blocks_v = triton.cdiv(chunk.stop - chunk.start, tile.block_v)
        dlogits_pointer_kernel[(triton.cdiv(capacity, tile.block_t) * blocks_v,)](
            self.rows.hidden,
            self.weight_VD,
            self.bias_V,
            self.rows.fields,
            self.rows.target,
            None if self.stored is None else self.stored.number,
            self.rows.active.number,
            chunk.dz,
            chunk.bias_partials,
            *self.weight_VD.stride(),
            chunk.dz.stride(0),
            capacity,
            hidden,
            chunk.start,
            chunk.stop,
            self.softcap or 0.0,
            EVEN_D=hidden % tile.block_d == 0,
            **self._constants(chunk, tile),
        )

    def _from_descriptors(self, chunk: Chunk, tile: Tile) -> None:
        # Not everywhere that Triton is.
        from triton.tools.tensor_descriptor import TensorDescriptor

        capacity, hidden = self.rows.hidden.shape
        blocks_v = triton.cdiv(chunk.stop - chunk.start, tile.block_v)
        programs = n_tiles = triton.cdiv(capacity, tile.block_t) * blocks_v
        if tile.variant == "tma":
            programs = device.programs(n_tiles, self.weight_VD.device)
        dlogits_tma_kernel[(programs,)](
            TensorDescriptor.from_tensor(self.rows.hidden, [tile.block_t, tile.block_d]),
            TensorDescriptor.from_tensor(self.weight_VD, [tile.block_v, tile.block_d]),
            self.bias_V,
            self.rows.fields,
            self.rows.target,
            None if self.stored is None else self.stored.number,
            self.rows.active.number,
            chunk.dz,
            chunk.bias_partials,
            chunk.dz.stride(0),
            capacity,
            hidden,
            chunk.start,
            chunk.stop,
            self.softcap or 0.0,
            FLATTEN=tile.variant == "tma",
            **self._constants(chunk, tile),
        )

    def _from_cutlass(self, chunk: Chunk, tile: Tile) -> None:
        rows = self.rows
        cuda_head.dlogits(
            cutlass.block(rows.hidden.device, tile),
            cuda_head.Product(rows.hidden, self.weight_VD, self.bias_V, softcap=self.softcap),
            cuda_head.Gradients(
                rows.fields,
                rows.target,
                None if self.stored is None else self.stored.number,
                rows.active.number,
                chunk.dz,
                chunk.bias_partials,
                chunk.start,
                chunk.stop,
                self.has_entropy,
            ),
        )

    def _flags(self, chunk: Chunk) -> dict[str, Any]:
        return {
            "HAS_BIAS": self.bias_V is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_ENTROPY": self.has_entropy,
            "NEEDS_BIAS": chunk.bias_partials is not None,
        }

    def _constants(self, chunk: Chunk, tile: Tile) -> dict[str, Any]:
        return {
            **self._flags(chunk),
            "HAS_FIRST": self.stored is not None,
            "UPCAST": device.interpreting(),
            "BLOCK_C": tile.block_t,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "GROUP_C": tile.group_t,
            **tile.options,
        }
