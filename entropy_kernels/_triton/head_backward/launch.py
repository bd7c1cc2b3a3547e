"""Gradients of the head, from the rows whose incoming gradient is not zero.

Those rows are brought together. Then, for each chunk of the vocabulary, a kernel writes dz
(dlogits_functions.py has the formula). From it torch's products give the weight's rows of that
chunk, each written once, and a term of the hidden states' gradient, summed in fp32. Nothing is
atomic: a call gives the same bits every time.

T tokens, C room for active rows, D hidden, V vocabulary, N columns of a chunk, S splits of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import device
from ..._rows import ForwardRows
from ...head import Head
from ..common import choice, cutlass, products, tiles
from ..common.tiles import Tile
from .launch_dlogits import Chunk, Dlogits
from .launch_rows import (
    ActiveRows,
    CompactRows,
    Gradients,
    StoredRows,
    active_rows,
    compact,
    spread,
)

# A chunk has a multiple of so many columns: as many as dz has room for in its bytes, at least one.
CHUNK_V = 1024
DZ_BYTES = 1 << 28
# Tile of cuBLAS: a product of fewer tiles than processors is split along its depth.
PRODUCT_TILE = (128, 256)
MAX_SPLITS = 8
# fp32 rows of the weight's gradient on their way into main_grad.
STAGING_BYTES = 1 << 26


class _Needs(NamedTuple):
    """Whose gradient is wanted."""

    hidden: bool
    weight: bool
    bias: bool


@torch.no_grad()
def backward(
    gradients: Gradients,
    head: Head,
    rows: ForwardRows,
    needs: tuple[bool, bool, bool],
    *,
    main_grad: Tensor | None = None,
    reduce_hidden: Callable[[Tensor, Tensor], None] | None = None,
    max_active_rows: int | None = None,
    tile: Tile | None = None,
    chunk_v: int | None = None,
    refused: Callable[[Tile], bool] | None = None,
    impl: str = "triton",
) -> Gradients:
    """Gradients of hidden states, weight and bias; None for what `needs` does not ask for.

    main_grad: [V, D] of any dtype. The weight's gradient is added to it in fp32 and rounded once;
        None is returned for it.
    reduce_hidden: takes the hidden states' gradient of the active rows, fp32 [C, D], and their
        numbers, before it is rounded. It may change it in place, to add what other ranks have.
        Places left over are zeros of row 0.
    max_active_rows: C, a bound of the number of rows with a gradient. With it the host waits for
        nothing, and a CUDA graph can hold the call. More active rows make every gradient NaN.
        Without it the host reads their number, one synchronisation, and C is exact.
    tile: overrules the table, for tests and tuning.
    chunk_v: N, a multiple of 8, for tests; by default what DZ_BYTES has room for.
    refused: which tiles are known to be wrong here. One is taken only if there is no other.
    impl: "cuda" takes the tiles of csrc/cuda first, and tells once why it cannot.

    Where `rows` has the logits of all rows, nothing is recomputed. Where it has those of some, the
    active rows are recomputed from the first that is not among them. dz is rounded to the dtype of
    the inputs, as eager's is: fp16 wants a scaled loss here too. Products accumulate in fp32.

    Beyond its results a call allocates at most, with E bytes per element of the inputs,

        C D (E + 4)       the active rows of the hidden states, and their gradient in fp32
        + N C E           dz; N <= V the columns for which this is <= DZ_BYTES, or N = CHUNK_V
        + C D 4           a term of that gradient, where a second chunk follows
        + S C D 4         the splits of a term, if tiles are fewer than processors: <= 17 MB on 132
        + 36 C + 12 T     the numbers of the rows, and numbers per active row
        + N C / 3         the bias's gradient, where needed
        + STAGING_BYTES   where there is a `main_grad`, and torch cannot add a product to it
        + 2 UPCAST_BYTES  where torch has no fp32 products of 16-bit matrices (products.py)

    Raises:
        ValueError: a negative max_active_rows; a main_grad that is not [V, D] on the device of
            the weight, or given while the weight needs no gradient.
    """
    needs = _Needs(*needs)
    _check(max_active_rows, main_grad, head.weight, needs)
    with device.on(head.hidden.device):
        active = active_rows(
            gradients, head.target, head.ignore_index, max_active_rows, rows.places
        )
        if active.rows.numel() == 0:
            return _zeros(head, needs, main_grad)
        compacted = compact(active, gradients, head, rows)
        stored = _stored(active, rows)
        all_stored = stored is not None and stored.known == active.rows.numel()
        if not all_stored and tile is None:
            tile = choice.first(preferred(compacted.hidden, head, impl), refused)
            if impl == "cuda":
                choice.tell_of_triton("dlogits", tile, head)
        dlogits = Dlogits(
            compacted,
            head.weight,
            None if head.bias is None else head.bias.contiguous(),
            head.softcap,
            rows.logits,
            stored,
            gradients[1] is not None,
            None if all_stored else tile,
        )
        dhidden_CD, dweight_VD, dbias_V = _gradients(dlogits, needs, main_grad, chunk_v)
        if dhidden_CD is not None and reduce_hidden is not None:
            reduce_hidden(dhidden_CD, active.rows)
        dhidden_TD = None if dhidden_CD is None else spread(dhidden_CD, active, head.hidden)
    return dhidden_TD, dweight_VD, dbias_V


def _check(
    max_active_rows: int | None, main_grad: Tensor | None, weight_VD: Tensor, needs: _Needs
) -> None:
    if max_active_rows is not None and max_active_rows < 0:
        raise ValueError(f"max_active_rows must be >= 0 or None; got {max_active_rows}")
    if main_grad is None:
        return
    if not needs.weight:
        raise ValueError("main_grad is given, but the weight needs no gradient")
    wanted = weight_VD.shape, weight_VD.device
    got = main_grad.shape, main_grad.device
    if got != wanted:
        raise ValueError(f"main_grad must be {wanted}; got {got}")


def _stored(active: ActiveRows, rows: ForwardRows) -> StoredRows | None:
    """The active rows whose logits are read; None where the host knows that there are none."""
    if rows.places is None and rows.logits.numel():
        return StoredRows(active.rows, active.number, active.rows.numel())
    if active.stored is not None and active.exact and active.stored.known == 0:
        return None
    return active.stored


def preferred(hidden_CD: Tensor, head: Head, impl: str = "triton") -> tuple[Tile, ...]:
    """The tiles that can recompute logits of these rows, the table's first choice first."""
    arch = device.architecture(hidden_CD.device)
    usable = tiles.variants(arch, hidden_CD, head.weight)
    count, hidden = hidden_CD.shape
    if impl == "cuda":
        usable |= cutlass.variants("dlogits", arch, hidden_CD.dtype, hidden, head.weight)
    where = arch, hidden_CD.dtype, hidden, count, usable
    return choice.dlogits_row(where, softcap=head.softcap is not None)


def _zeros(head: Head, needs: _Needs, main_grad: Tensor | None) -> Gradients:
    """Without an active row no product is launched, and nothing is added to `main_grad`."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    return (
        hidden.new_zeros(hidden.shape) if needs.hidden else None,
        weight.new_zeros(weight.shape) if needs.weight and main_grad is None else None,
        bias.new_zeros(bias.shape) if needs.bias and bias is not None else None,
    )


def _gradients(
    dlogits: Dlogits, needs: _Needs, main_grad: Tensor | None, chunk_v: int | None
) -> Gradients:
    """One pass over the vocabulary: fp32 dhidden [C, D], the others as they are returned."""
    rows, weight_VD = dlogits.rows, dlogits.weight_VD
    count, vocabulary = rows.hidden.shape[0], weight_VD.shape[0]
    if chunk_v is None:
        chunk_v = _chunk_columns(count, vocabulary, rows.hidden.element_size())
    # Nothing writes places beyond the last active row, or partials of blocks without one.
    buffer = rows.hidden.new_empty if rows.active.exact else rows.hidden.new_zeros
    dz_CN = buffer(count, chunk_v)
    partials = rows.fields.new_zeros(dlogits.n_partials, chunk_v) if needs.bias else None
    dhidden = _HiddenGradient(rows) if needs.hidden else None
    own = needs.weight and main_grad is None
    dweight_VD = weight_VD.new_empty(weight_VD.shape) if own else None
    dbias_V = rows.fields.new_empty(vocabulary) if needs.bias else None

    for start in range(0, vocabulary, chunk_v):
        stop = min(start + chunk_v, vocabulary)
        dlogits.write(Chunk(start, stop, dz_CN, partials))
        dz = dz_CN[:, : stop - start]
        if dbias_V is not None and partials is not None:
            torch.sum(partials[:, : stop - start], 0, out=dbias_V[start:stop])
        if dweight_VD is not None:
            products.mm(dz.T, rows.hidden, out=dweight_VD[start:stop])
        if main_grad is not None:
            _add_weight_gradient(dz, rows.hidden, main_grad[start:stop])
        if dhidden is not None:
            dhidden.add(dz, weight_VD[start:stop])
    if dbias_V is not None and dlogits.bias_V is not None:
        dbias_V = dbias_V.to(dlogits.bias_V.dtype)
    return None if dhidden is None else dhidden.sum_CD, dweight_VD, dbias_V


def _chunk_columns(count: int, vocabulary: int, element_size: int) -> int:
    """Columns of a chunk, a multiple of 8: rows of dz begin at 16 bytes then.

    Few chunks, all but the last of one size: each chunk reads and writes dhidden once more.
    """
    fitting = max(DZ_BYTES // (count * element_size) // CHUNK_V, 1) * CHUNK_V
    chunks = triton.cdiv(vocabulary, fitting)
    columns = triton.cdiv(vocabulary, chunks * CHUNK_V) * CHUNK_V
    return min(columns, triton.cdiv(vocabulary, 8) * 8)


def _add_weight_gradient(dz_CN: Tensor, hidden_CD: Tensor, out_ND: Tensor) -> None:
    """out += dz^T hidden: at once where torch can, else through a buffer of bounded size."""
    if products.add_mm(dz_CN.T, hidden_CD, out_ND):
        return
    columns, hidden = out_ND.shape
    step = min(columns, max(1, STAGING_BYTES // (4 * hidden)))
    staging = torch.empty(step, hidden, dtype=torch.float32, device=out_ND.device)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        term = staging[: stop - start]
        products.mm(dz_CN[:, start:stop].T, hidden_CD, out=term)
        out_ND[start:stop] += term


class _HiddenGradient:
    """The sum over chunks of dz W, fp32 [C, D].

    A product of few rows and columns has too few tiles for all processors. Its depth is then split,
    and the terms are added in their order.
    """

    def __init__(self, rows: CompactRows) -> None:
        count, hidden = rows.hidden.shape
        n_tiles = triton.cdiv(count, PRODUCT_TILE[0]) * triton.cdiv(hidden, PRODUCT_TILE[1])
        fitting = device.processors(rows.hidden.device) // n_tiles
        self._splits = min(MAX_SPLITS, 1 << max(0, fitting.bit_length() - 1))
        self._empty = True
        self.sum_CD = rows.fields.new_empty(count, hidden)

    def add(self, dz_CN: Tensor, weight_ND: Tensor) -> None:
        columns = weight_ND.shape[0]
        splits = self._splits
        while columns % (8 * splits) and splits > 1:
            splits //= 2
        term = self.sum_CD if self._empty else torch.empty_like(self.sum_CD)
        if splits == 1:
            products.mm(dz_CN, weight_ND, out=term)
        else:
            parts = term.new_empty(splits, *term.shape)
            left = dz_CN.unflatten(1, (splits, -1)).transpose(0, 1)
            products.bmm(left, weight_ND.unflatten(0, (splits, -1)), out=parts)
            torch.sum(parts, 0, out=term)
        if not self._empty:
            self.sum_CD += term
        self._empty = False
