"""The active rows brought together for backward, and their gradient brought back.

T tokens, C room for active rows, D hidden.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._rows import ForwardRows, per_row
from ..common.logit_functions import load_inverse_temperature
from .launch_rows import ActiveRows

FIELDS = 6
# Rows that a program takes, and columns of them at once.
BLOCK_ROWS = 4
MAX_BLOCK_D = 512


class CompactRows(NamedTuple):
    """What backward needs of the active rows, without gaps; the rest of C holds zeros.

    hidden: [C, D], contiguous.
    fields: fp32 [FIELDS, C]: the maximum, 1 / temperature and log sum of forward; the gradients
        of logprob and entropy, and rest = g_logsumexp - g_entropy H, all over the temperature.
    target: int64 [C]; -1 beyond the active rows.
    active: the rows' numbers.
    """

    hidden: Tensor
    fields: Tensor
    target: Tensor
    active: ActiveRows


@triton.jit
def gather(
    hidden_ptr,
    target_ptr,
    temperature_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_logsumexp_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    index_ptr,
    number_ptr,
    out_hidden_ptr,  # [C, D]
    out_fields_ptr,  # [FIELDS, C]
    out_target_ptr,  # [C]
    stride_ht,
    stride_hd,
    stride_temperature,
    capacity,
    limit,
    D,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies rows of hidden states, and reduces all else to a few numbers a row.

    More rows than `limit` make every gradient NaN.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    number = tl.load(number_ptr)
    mask = offs_c < tl.minimum(number, capacity)
    mask_out = offs_c < capacity
    row = tl.load(index_ptr + offs_c, mask=mask, other=0).to(tl.int64)
    inverse = load_inverse_temperature(
        temperature_ptr, stride_temperature, row, mask, HAS_TEMPERATURE
    )
    g_logprob = tl.zeros([BLOCK_C], tl.float32)
    g_entropy = tl.zeros([BLOCK_C], tl.float32)
    rest = tl.zeros([BLOCK_C], tl.float32)
    if HAS_LOGPROB:
        g_logprob += tl.load(grad_logprob_ptr + row, mask=mask, other=0.0) * inverse
    if HAS_LOGSUMEXP:
        rest += tl.load(grad_logsumexp_ptr + row, mask=mask, other=0.0) * inverse
    if HAS_ENTROPY:
        g_entropy += tl.load(grad_entropy_ptr + row, mask=mask, other=0.0) * inverse
        rest -= g_entropy * tl.load(entropy_ptr + row, mask=mask, other=0.0)
    rest = tl.where(number > limit, float("nan"), rest)
    peak = tl.load(max_ptr + row, mask=mask, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=mask, other=0.0)
    target = tl.load(target_ptr + row, mask=mask, other=-1)
    out_fields_ptr += offs_c
    tl.store(out_fields_ptr, peak, mask=mask_out)
    tl.store(out_fields_ptr + capacity, inverse, mask=mask_out)
    tl.store(out_fields_ptr + 2 * capacity, log_sum, mask=mask_out)
    tl.store(out_fields_ptr + 3 * capacity, g_logprob, mask=mask_out)
    tl.store(out_fields_ptr + 4 * capacity, g_entropy, mask=mask_out)
    tl.store(out_fields_ptr + 5 * capacity, rest, mask=mask_out)
    tl.store(out_target_ptr + offs_c, target.to(tl.int64), mask=mask_out)

    offs_d = tl.arange(0, BLOCK_D)
    in_ptrs = hidden_ptr + row[:, None] * stride_ht + offs_d.to(tl.int64)[None, :] * stride_hd
    out_ptrs = out_hidden_ptr + offs_c.to(tl.int64)[:, None] * D + offs_d[None, :]
    for start_d in range(0, D, BLOCK_D):
        mask_d = (offs_d < D - start_d)[None, :]
        x = tl.load(in_ptrs, mask=mask[:, None] & mask_d, other=0.0)
        tl.store(out_ptrs, x, mask=mask_out[:, None] & mask_d)
        in_ptrs += BLOCK_D * stride_hd
        out_ptrs += BLOCK_D


@triton.jit
def scatter(
    rows_ptr,  # fp32 [C, D]
    slot_ptr,
    number_ptr,
    out_ptr,  # [T, D]
    limit,
    T,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each row of T from its place in C; zeros for rows without one, NaN if C had not room."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slot_ptr + offs_t, mask=offs_t < T, other=-1).to(tl.int64)
    start = tl.where(tl.load(number_ptr) > limit, float("nan"), 0.0)
    offs_d = tl.arange(0, BLOCK_D)
    in_ptrs = rows_ptr + slot[:, None] * D + offs_d[None, :]
    out_ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * D + offs_d[None, :]
    for start_d in range(0, D, BLOCK_D):
        mask_d = (offs_d < D - start_d)[None, :]
        x = tl.load(in_ptrs, mask=(slot >= 0)[:, None] & mask_d, other=0.0) + start
        tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & mask_d)
        in_ptrs += BLOCK_D
        out_ptrs += BLOCK_D


def compact(
    active: ActiveRows,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    hidden_TD: Tensor,
    target_T: Tensor,
    temperature: Tensor | None,
    found: ForwardRows,
) -> CompactRows:
    """The active rows of everything. 4 C (FIELDS + 2) bytes and a copy of their hidden states."""
    capacity, hidden = active.rows.numel(), hidden_TD.shape[1]
    temperature_T = per_row(temperature, target_T)
    rows = CompactRows(
        hidden_TD.new_empty(capacity, hidden),
        torch.empty(FIELDS, capacity, dtype=torch.float32, device=hidden_TD.device),
        torch.empty(capacity, dtype=torch.int64, device=hidden_TD.device),
        active,
    )
    gather[(triton.cdiv(capacity, BLOCK_ROWS),)](
        hidden_TD,
        target_T.contiguous(),
        temperature_T,
        *(None if g is None else g.float().contiguous() for g in gradients),
        found.entropy.contiguous(),
        found.max.contiguous(),
        found.log_sum.contiguous(),
        active.rows,
        active.number,
        rows.hidden,
        rows.fields,
        rows.target,
        *hidden_TD.stride(),
        0 if temperature_T is None else temperature_T.stride(0),
        capacity,
        active.limit,
        hidden,
        HAS_TEMPERATURE=temperature_T is not None,
        HAS_LOGPROB=gradients[0] is not None,
        HAS_ENTROPY=gradients[1] is not None,
        HAS_LOGSUMEXP=gradients[2] is not None,
        BLOCK_C=BLOCK_ROWS,
        BLOCK_D=min(MAX_BLOCK_D, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return rows


def spread(rows_CD: Tensor, active: ActiveRows, like_TD: Tensor) -> Tensor:
    """[T, D] in the dtype of `like_TD`, contiguous: the active rows in their places, else zeros."""
    out_TD = torch.empty(like_TD.shape, dtype=like_TD.dtype, device=like_TD.device)
    count, hidden = like_TD.shape
    scatter[(triton.cdiv(count, BLOCK_ROWS),)](
        rows_CD,
        active.slot,
        active.number,
        out_TD,
        active.limit,
        count,
        hidden,
        BLOCK_T=BLOCK_ROWS,
        BLOCK_D=min(MAX_BLOCK_D, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return out_TD
