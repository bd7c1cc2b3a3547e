"""Which tiles a call may take, in order of preference, and the first that is not known to be wrong.

T tokens or active rows, D hidden.
"""

import functools
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ... import device
from ..._arguments import warn_caller
from ..._rows import FILLED_BY_CSRC_CUDA, STATISTICS
from ...head import Head
from . import cutlass
from .tiles import ANY, TMA, Tile, row

# Architecture, dtype, D, rows and usable variants: what a row of the table is looked up by.
Where = tuple[str, torch.dtype, int, int, Collection[str]]


def forward_row(
    where: Where,
    *,
    keep_logits: bool = False,
    stores_rows: bool = False,
    statistics: bool = False,
    softcap: bool = False,
) -> tuple[Tile, ...]:
    """The tiles of a forward with these options, of the variants that have them."""
    arch, dtype, hidden, tokens, variants = where
    usable = {*variants}
    if keep_logits:
        usable -= {*TMA}
    if statistics:
        # How many registers it needs for nine sums is unknown: Triton 3.6 alone has it.
        usable -= {"tma_ws"}
    if stores_rows:
        usable &= {"cublas"}
    op = "forward" + "_keep" * keep_logits + "_store" * stores_rows
    op += "_statistics" * statistics + "_softcap" * softcap
    of_cuda = cutlass.row(op, arch, dtype, hidden, tokens, usable)
    return of_cuda + row(op, arch, dtype, hidden, tokens, usable)


def dlogits_row(where: Where, *, softcap: bool = False) -> tuple[Tile, ...]:
    """The tiles that recompute logits in a backward."""
    op = "dlogits" + "_softcap" * softcap
    return cutlass.row(op, *where) + row(op, *where)


def first(found: tuple[Tile, ...], refused: Callable[[Tile], bool] | None) -> Tile:
    """The first tile of a row that is not refused; where all are, the first."""
    return next((tile for tile in found if refused is None or not refused(tile)), found[0])


def tell_of_triton(
    op: str,
    tile: Tile,
    head: Head,
    stores_rows: bool = False,
    statistics: Tensor | None = None,
) -> None:
    """Says once why impl="cuda" takes another tile than csrc/cuda's, where it does."""
    if tile.variant == cutlass.VARIANT:
        return
    arch, hidden = device.architecture(head.hidden.device), head.hidden
    why = cutlass.why_not(op, arch, hidden.dtype, hidden.shape[1], head.weight)
    if stores_rows:
        why = why or "keep_logits_above must be None, as it stores no single rows; got a threshold"
    if statistics is not None and len(statistics) > FILLED_BY_CSRC_CUDA:
        names = ", ".join(STATISTICS[:FILLED_BY_CSRC_CUDA])
        why = why or f"statistics must be out of {names}; got others, too"
    _tell(op, why or "its kernel must be right on this GPU; --verify has found it to be wrong")


@functools.cache
def _tell(op: str, why: str) -> None:
    warn_caller(f'impl="cuda" takes a Triton kernel for {op}: {why}', RuntimeWarning)


def stores_rows(
    on: torch.device,
    dtype: torch.dtype,
    hidden: int,
    refused: Callable[[Tile], bool] | None = None,
) -> bool:
    """Whether a forward stores the logits of rows above a threshold, as many as fit, for backward.

    The kernels that store nothing are faster where a product is short against the traffic of its
    logits, which "cublas" writes and reads. A tile that is refused stores none.
    """
    everywhere = {"pointer", "cublas", *TMA}
    found, *_ = row("forward_store", device.architecture(on), dtype, hidden, ANY, everywhere)
    return found.variant == "cublas" and not (refused and refused(found))
