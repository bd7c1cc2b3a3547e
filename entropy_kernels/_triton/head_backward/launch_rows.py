"""The rows at which a gradient arrives, numbered on the GPU.

Programs have consecutive blocks of rows: one launch counts the active rows of each, a second gives
each the numbers that the programs before it leave. Integers only: the same every time.

T tokens, C capacity: room for that many active rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head_forward.launch_store import KeptRows, kept_rows

BLOCK = 1024
MAX_PROGRAMS = 1024


class ActiveRows(NamedTuple):
    """Where the active rows are; `number` is on their device, the host knows only the bounds.

    rows: int32 [C], their row numbers, ascending; 0 beyond `number`.
    slot: int32 [T], where in `rows` each row is; -1 for rows that are not.
    number: int32 [1], how many are active. More than `limit`: `rows` has only the first of them.
    limit: what the caller allowed, at most T; C = max(1, limit) then. Or the number itself, = C.
    exact: whether the latter, so that no place in `rows` is left over.
    kept: those of them whose logits forward has kept, where it has kept some rows'.
    """

    rows: Tensor
    slot: Tensor
    number: Tensor
    limit: int
    exact: bool
    kept: KeptRows | None = None


@triton.jit
def _active(
    logprob_ptr,
    entropy_ptr,
    logsumexp_ptr,
    target_ptr,
    offs,
    n,
    ignore_index,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
):
    """1 where any gradient is not exactly 0, which a NaN is not, and the target not ignored."""
    inside = offs < n
    any_grad = offs < 0
    if HAS_LOGPROB:
        any_grad |= tl.load(logprob_ptr + offs, mask=inside, other=0.0) != 0.0
    if HAS_ENTROPY:
        any_grad |= tl.load(entropy_ptr + offs, mask=inside, other=0.0) != 0.0
    if HAS_LOGSUMEXP:
        any_grad |= tl.load(logsumexp_ptr + offs, mask=inside, other=0.0) != 0.0
    kept = tl.load(target_ptr + offs, mask=inside, other=0) != ignore_index
    return (inside & any_grad & kept).to(tl.int32)


@triton.jit
def count_active(
    logprob_ptr,
    entropy_ptr,
    logsumexp_ptr,
    target_ptr,
    counts_ptr,  # int32, one a program
    n,
    blocks_per_program,
    ignore_index,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.int32)
    for i in range(blocks_per_program):
        offs = (program * blocks_per_program + i) * BLOCK + tl.arange(0, BLOCK)
        count += _active(
            logprob_ptr,
            entropy_ptr,
            logsumexp_ptr,
            target_ptr,
            offs,
            n,
            ignore_index,
            HAS_LOGPROB,
            HAS_ENTROPY,
            HAS_LOGSUMEXP,
        )
    tl.store(counts_ptr + program, tl.sum(count))


@triton.jit
def write_active(
    logprob_ptr,
    entropy_ptr,
    logsumexp_ptr,
    target_ptr,
    counts_ptr,
    index_ptr,  # int32 [C], zeros
    slot_ptr,  # int32 [T]
    number_ptr,
    n,
    blocks_per_program,
    ignore_index,
    capacity,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    others = tl.arange(0, MAX_PROGRAMS)
    used = tl.sum(tl.load(counts_ptr + others, mask=others < program, other=0))
    for i in range(blocks_per_program):
        offs = (program * blocks_per_program + i) * BLOCK + tl.arange(0, BLOCK)
        active = _active(
            logprob_ptr,
            entropy_ptr,
            logsumexp_ptr,
            target_ptr,
            offs,
            n,
            ignore_index,
            HAS_LOGPROB,
            HAS_ENTROPY,
            HAS_LOGSUMEXP,
        )
        slot = used + tl.cumsum(active, 0) - 1
        placed = (active != 0) & (slot < capacity)
        tl.store(index_ptr + slot, offs.to(tl.int32), mask=placed)
        tl.store(slot_ptr + offs, tl.where(placed, slot, -1), mask=offs < n)
        used += tl.sum(active)
    if program == tl.num_programs(0) - 1:
        tl.store(number_ptr, used)


def active_rows(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    target_T: Tensor,
    ignore_index: int,
    max_active_rows: int | None,
    places_T: Tensor | None = None,
) -> ActiveRows:
    """The rows at which any of the gradients (logprob, entropy, logsumexp), fp32 [T], is not 0.

    With `max_active_rows` the host waits for nothing. Without, it reads their number: one
    synchronisation, and nothing is left over. `places_T`: where forward has kept their logits.
    """
    count = target_T.numel()
    blocks_per_program = triton.cdiv(count, BLOCK * MAX_PROGRAMS)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": target_T.device}
    slot_T = torch.empty(count, **int32)
    number = torch.zeros(1, **int32)
    if count == 0:
        return ActiveRows(slot_T, slot_T, number, 0, True)
    programs = triton.cdiv(count, BLOCK * blocks_per_program)
    inputs = [None if g is None else g.float().contiguous() for g in gradients]
    inputs.append(target_T.contiguous())
    flags = {
        "HAS_LOGPROB": gradients[0] is not None,
        "HAS_ENTROPY": gradients[1] is not None,
        "HAS_LOGSUMEXP": gradients[2] is not None,
    }
    counts = torch.empty(programs, **int32)
    count_active[(programs,)](
        *inputs,
        counts,
        count,
        blocks_per_program,
        ignore_index,
        **flags,
        BLOCK=BLOCK,
        num_warps=4,
    )
    exact = max_active_rows is None
    limit = count if max_active_rows is None else min(max_active_rows, count)
    capacity = max(1, limit)
    index_C = torch.zeros(capacity, **int32)
    write_active[(programs,)](
        *inputs,
        counts,
        index_C,
        slot_T,
        number,
        count,
        blocks_per_program,
        ignore_index,
        capacity,
        **flags,
        BLOCK=BLOCK,
        MAX_PROGRAMS=MAX_PROGRAMS,
        num_warps=4,
    )
    kept = None if places_T is None else kept_rows(index_C, number, places_T)
    if exact:
        limit, *known = torch.cat([number] if kept is None else [number, kept.number]).tolist()
        index_C = index_C[:limit]
        kept = None if kept is None else kept._replace(known=known[0])
    return ActiveRows(index_C, slot_T, number, limit, exact, kept)
