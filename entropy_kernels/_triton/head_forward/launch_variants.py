"""The launches of a forward: partial sums by one of four kernels, the targets' logits, a merge.

T tokens, D hidden, V vocabulary, S vocabulary splits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ... import device
from ..._cuda_kernels import head as cuda_head
from ..._cuda_kernels import merge as cuda_merge
from ..._rows import ForwardRows
from ...head import Head
from ..common import cutlass, products
from ..common.tiles import Tile
from .cublas_kernel import forward_cublas_kernel
from .launch_valid import ValidRows
from .merge_kernel import merge_kernel
from .pointer_kernel import forward_pointer_kernel
from .target_logit_kernel import target_logit_kernel
from .tma_kernel import forward_tma_kernel

# fp32 logits of as many rows as fit, at least one block of them.
WORKSPACE_BYTES = 1 << 29
WORKSPACE_BLOCK = 128
# Rows and splits of one program that merges.
MERGE_BLOCK = (32, 16)
# Rows of one product with their targets' weights, at most, by bytes of an element. With more fp32
# rows registers would spill.
TARGET_BLOCK = {2: 64, 4: 32}


class Work(NamedTuple):
    """What all launches of one forward read and write.

    n_split, tiles_per_split: S, and blocks of columns in each split.
    target_T, bias_V, temperature_T: the head's, contiguous, and one temperature per row.
    partials: fp32 [4, S, T], with statistics [9, S, T], of csrc/cuda [7, S, T].
    target_logit_T: fp32, the capped logit of each row's target.
    valid: the rows that partials have, unless they have all of them in their order.
    rows, statistics: the results, to be filled.
    """

    head: Head
    tile: Tile
    n_split: int
    tiles_per_split: int
    target_T: Tensor
    bias_V: Tensor | None
    temperature_T: Tensor | None
    partials: Tensor
    target_logit_T: Tensor
    rows: ForwardRows
    statistics: Tensor | None
    valid: ValidRows | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, D and V."""
        return *self.head.hidden.shape, self.head.weight.shape[0]

    @property
    def softcap(self) -> float:
        return self.head.softcap or 0.0

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels of the partial sums have in common."""
        return {
            "HAS_BIAS": self.bias_V is not None,
            "HAS_TEMPERATURE": self.temperature_T is not None,
            "HAS_SOFTCAP": self.head.softcap is not None,
            "STATISTICS": self.statistics is not None,
            "BLOCK_T": self.tile.block_t,
            "BLOCK_V": self.tile.block_v,
            "TILES": self.tiles_per_split,
            **self.tile.options,
        }

    @property
    def product_constants(self) -> dict[str, Any]:
        """And those that multiply as well."""
        return {
            "UPCAST": device.interpreting(),
            "BLOCK_D": self.tile.block_d,
            "GROUP_T": self.tile.group_t,
            **self.constants,
        }


def _stride(temperature_T: Tensor | None) -> int:
    return 0 if temperature_T is None else temperature_T.stride(0)


def from_pointers(work: Work, valid: ValidRows) -> None:
    head, tile, (count, hidden, vocabulary) = work.head, work.tile, work.sizes
    forward_pointer_kernel[(triton.cdiv(count, tile.block_t) * work.n_split,)](
        valid.hidden,
        head.weight,
        work.bias_V,
        valid.temperature,
        valid.numbered.rows,
        valid.numbered.number,
        work.partials,
        work.rows.logits,
        *valid.hidden.stride(),
        *head.weight.stride(),
        _stride(valid.temperature),
        count,
        hidden,
        vocabulary,
        work.n_split,
        work.softcap,
        STORE_LOGITS=work.rows.logits.numel() > 0,
        EVEN_D=hidden % tile.block_d == 0,
        **work.product_constants,
    )


def from_descriptors(work: Work, valid: ValidRows) -> None:
    # Not everywhere that Triton is.
    from triton.tools.tensor_descriptor import TensorDescriptor

    head, tile, (count, hidden, vocabulary) = work.head, work.tile, work.sizes
    programs = units = triton.cdiv(count, tile.block_t) * work.n_split
    if tile.variant != "tma_split":
        programs = device.programs(units, head.hidden.device)
    forward_tma_kernel[(programs,)](
        TensorDescriptor.from_tensor(valid.hidden, [tile.block_t, tile.block_d]),
        TensorDescriptor.from_tensor(head.weight, [tile.block_v, tile.block_d]),
        work.bias_V,
        valid.temperature,
        valid.numbered.number,
        work.partials,
        _stride(valid.temperature),
        count,
        hidden,
        vocabulary,
        work.n_split,
        work.softcap,
        FLATTEN=tile.variant == "tma",
        WARP_SPECIALIZE=tile.variant == "tma_ws",
        **work.product_constants,
    )


def from_cutlass(work: Work, valid: ValidRows) -> None:
    """Those of csrc/cuda, and the targets' logits with them."""
    head = work.head
    cuda_head.forward(
        cutlass.block(head.hidden.device, work.tile),
        cuda_head.Product(valid.hidden, head.weight, work.bias_V, valid.temperature, head.softcap),
        cuda_head.Rows(
            valid.target,
            valid.numbered.rows,
            valid.numbered.number,
            work.partials,
            work.target_logit_T,
            work.rows.logits if work.rows.logits.numel() else None,
        ),
    )


def chunks_of_logits(work: Work, rows: int | None = None) -> Iterator[tuple[Tensor, int]]:
    """The logits of each chunk of `rows` and its first row, once its partials are there.

    They are valid until the next chunk. By default a chunk has WORKSPACE_BYTES.
    """
    head, logits_TV, (count, _, vocabulary) = work.head, work.rows.logits, work.sizes
    fitting = WORKSPACE_BYTES // (4 * vocabulary) // WORKSPACE_BLOCK * WORKSPACE_BLOCK
    rows = min(rows or max(fitting, WORKSPACE_BLOCK), count)
    stored = logits_TV.numel() > 0
    workspace = logits_TV if stored else work.partials.new_empty(rows, vocabulary)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        z = workspace[start:end] if stored else workspace[: end - start]
        products.mm(head.hidden[start:end], head.weight.T, out=z)
        forward_cublas_kernel[(triton.cdiv(end - start, work.tile.block_t) * work.n_split,)](
            z,
            work.bias_V,
            work.target_T,
            work.temperature_T,
            work.partials,
            work.target_logit_T,
            _stride(work.temperature_T),
            start,
            end,
            count,
            vocabulary,
            work.n_split,
            head.ignore_index,
            work.softcap,
            **work.constants,
        )
        yield z, start


def target_logits(work: Work, valid: ValidRows) -> None:
    """The logit of each target, summed in steps of the tile's depth."""
    head, tile, (count, hidden, vocabulary) = work.head, work.tile, work.sizes
    block_t = min(TARGET_BLOCK[head.hidden.element_size()], tile.block_t)
    target_logit_kernel[(triton.cdiv(count, block_t),)](
        valid.hidden,
        head.weight,
        work.bias_V,
        valid.target,
        valid.numbered.number,
        work.target_logit_T,
        *valid.hidden.stride(),
        *head.weight.stride(),
        hidden,
        vocabulary,
        work.softcap,
        HAS_BIAS=work.bias_V is not None,
        HAS_SOFTCAP=head.softcap is not None,
        UPCAST=device.interpreting(),
        BLOCK_T=block_t,
        BLOCK_D=tile.block_d,
        **tile._replace(num_warps=4, max_registers=0).options,
    )


def merge(work: Work, start: int, stop: int) -> None:
    """The results of rows start to stop, once all their partials are there."""
    if work.tile.variant == cutlass.VARIANT:
        _merge_by_cuda(work)
        return
    (count, _, vocabulary), (block_t, block_s) = work.sizes, MERGE_BLOCK
    merge_kernel[(triton.cdiv(stop - start, block_t),)](
        work.partials,
        work.target_logit_T,
        None if work.valid is None else work.valid.numbered.slot,
        work.target_T,
        work.temperature_T,
        *work.rows[:5],
        work.statistics,
        _stride(work.temperature_T),
        start,
        stop,
        count,
        vocabulary,
        work.n_split,
        work.head.ignore_index,
        HAS_SLOTS=work.valid is not None,
        HAS_TEMPERATURE=work.temperature_T is not None,
        STATISTICS=work.statistics is not None,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        num_warps=4,
    )


def _merge_by_cuda(work: Work) -> None:
    """That of all rows."""
    assert work.valid is not None
    cuda_merge.merge(
        work.partials,
        work.target_logit_T,
        work.valid.numbered.slot,
        work.target_T,
        work.temperature_T,
        work.rows,
        work.statistics,
        work.head.weight.shape[0],
        work.head.ignore_index,
    )
