"""The rows at which a gradient arrives: numbered on the GPU, brought together, brought back.

Each program has consecutive blocks of rows. One launch counts the active rows of each program, a
second numbers them from where the programs before it end. Integers give the same every time.

T tokens, C room for active rows, D hidden.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._rows import ForwardRows
from ...head import Head
from .row_kernels import (
    FIELDS,
    active_rows_kernel,
    find_front_kernel,
    gather_kernel,
    scatter_kernel,
)

BLOCK = 1024
MAX_PROGRAMS = 1024
# Recomputed rows begin at a multiple of this, as do their tiles: no tile is read and recomputed.
STEP = 256
# Rows that a program copies, and columns of them at once.
COPY_ROWS = 4
MAX_COPY_D = 512

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class StoredRows(NamedTuple):
    """The compact rows whose logits are read: those at the front.

    place: int32 [C], the row of logits of each; undefined beyond the front.
    number: int32 [1], how many they are.
    known: how many of them the host knows of: all, if it has waited for their number.
    """

    place: Tensor
    number: Tensor
    known: int


class ActiveRows(NamedTuple):
    """Where the active rows are; `number` is on their device, the host knows only the bounds.

    rows: int32 [C], their row numbers, ascending; 0 beyond `number`.
    slot: int32 [T], the place of each row in `rows`; -1 for rows without one.
    number: int32 [1], how many are active. Where it exceeds `limit`, `rows` has the first of them.
    limit: what the caller allowed, at most T, with C = max(1, limit); or the number itself, C.
    exact: whether `limit` is the number itself, so that no place in `rows` is left over.
    stored: those whose logits are read, if forward has stored the logits of some rows.
    """

    rows: Tensor
    slot: Tensor
    number: Tensor
    limit: int
    exact: bool
    stored: StoredRows | None = None


class CompactRows(NamedTuple):
    """What backward needs of the active rows, without gaps; places left over hold zeros.

    hidden: [C, D], contiguous.
    fields: fp32 [FIELDS, C]: the maximum, 1 / temperature and log sum of forward; the gradients
        of logprob and entropy, and rest = g_logsumexp - g_entropy H, all over the temperature.
    target: int64 [C]; -1 beyond the active rows.
    active: where these rows come from.
    """

    hidden: Tensor
    fields: Tensor
    target: Tensor
    active: ActiveRows


def _inputs(gradients: Gradients) -> tuple[list[Tensor | None], dict[str, bool]]:
    """The gradients as kernels take them, and the constants that say which there are."""
    names = ("HAS_LOGPROB", "HAS_ENTROPY", "HAS_LOGSUMEXP")
    there = {name: g is not None for name, g in zip(names, gradients, strict=True)}
    return [None if g is None else g.float().contiguous() for g in gradients], there


def active_rows(
    gradients: Gradients | None,
    target_T: Tensor,
    ignore_index: int,
    max_active_rows: int | None,
    places_T: Tensor | None = None,
) -> ActiveRows:
    """The valid rows at which any gradient (logprob, entropy, logsumexp), fp32 [T], is not 0.

    Without gradients, all valid rows.
    With `max_active_rows` the host waits for nothing. Without it, it reads their number: one
    synchronisation, and no place is left over. `places_T`: where forward has stored their logits.
    """
    count = target_T.numel()
    blocks_per_program = triton.cdiv(count, BLOCK * MAX_PROGRAMS)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": target_T.device}
    slot_T = torch.empty(count, **int32)
    number = torch.zeros(1, **int32)
    if count == 0:
        return ActiveRows(slot_T, slot_T, number, 0, True)
    programs = triton.cdiv(count, BLOCK * blocks_per_program)
    inputs, there = _inputs(gradients or (None, None, None))
    target_T = target_T.contiguous()
    counts = torch.empty(programs, **int32)
    exact = max_active_rows is None
    limit = count if max_active_rows is None else min(max_active_rows, count)
    capacity = max(1, limit)
    index_C = torch.zeros(capacity, **int32)
    for counted in (False, True):
        active_rows_kernel[(programs,)](
            *inputs,
            target_T,
            counts,
            index_C,
            slot_T,
            number,
            count,
            blocks_per_program,
            ignore_index,
            capacity,
            EVERY_VALID=gradients is None,
            **there,
            COUNTED=counted,
            BLOCK=BLOCK,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4,
        )
    stored = None if places_T is None else stored_rows(index_C, number, places_T)
    if exact:
        limit, *known = torch.cat([number] if stored is None else [number, stored.number]).tolist()
        index_C = index_C[:limit]
        stored = None if stored is None else stored._replace(known=known[0])
    return ActiveRows(index_C, slot_T, number, limit, exact, stored)


def stored_rows(index_C: Tensor, number: Tensor, places_T: Tensor) -> StoredRows:
    """Which of the `number` rows `index_C` are read from stored logits."""
    front = StoredRows(torch.empty_like(index_C), torch.empty_like(number), 0)
    find_front_kernel[(1,)](
        index_C,
        number,
        places_T,
        front.place,
        front.number,
        index_C.numel(),
        STEP=STEP,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return front


def compact(active: ActiveRows, gradients: Gradients, head: Head, rows: ForwardRows) -> CompactRows:
    """The active rows of all inputs: 4 C (FIELDS + 2) bytes and a copy of their hidden states."""
    capacity, hidden = active.rows.numel(), head.hidden.shape[1]
    temperature_T = head.temperature_T
    inputs, there = _inputs(gradients)
    compacted = CompactRows(
        head.hidden.new_empty(capacity, hidden),
        torch.empty(FIELDS, capacity, dtype=torch.float32, device=head.hidden.device),
        torch.empty(capacity, dtype=torch.int64, device=head.hidden.device),
        active,
    )
    gather_kernel[(triton.cdiv(capacity, COPY_ROWS),)](
        head.hidden,
        head.target.contiguous(),
        temperature_T,
        *inputs,
        rows.entropy.contiguous(),
        rows.max.contiguous(),
        rows.log_sum.contiguous(),
        active.rows,
        active.number,
        compacted.hidden,
        compacted.fields,
        compacted.target,
        *head.hidden.stride(),
        0 if temperature_T is None else temperature_T.stride(0),
        capacity,
        active.limit,
        hidden,
        HAS_TEMPERATURE=temperature_T is not None,
        **there,
        BLOCK_C=COPY_ROWS,
        BLOCK_D=min(MAX_COPY_D, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return compacted


def spread(rows_CD: Tensor, active: ActiveRows, like_TD: Tensor) -> Tensor:
    """[T, D] in the dtype of `like_TD`, contiguous: the active rows in their places, else zeros."""
    out_TD = torch.empty(like_TD.shape, dtype=like_TD.dtype, device=like_TD.device)
    count, hidden = like_TD.shape
    scatter_kernel[(triton.cdiv(count, COPY_ROWS),)](
        rows_CD,
        active.slot,
        active.number,
        out_TD,
        active.limit,
        count,
        hidden,
        BLOCK_T=COPY_ROWS,
        BLOCK_D=min(MAX_COPY_D, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return out_TD
