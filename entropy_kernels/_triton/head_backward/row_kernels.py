"""The active rows, numbered and brought together; and their gradient, brought back.

T tokens, C room for active rows, D hidden.
"""

import triton
import triton.language as tl

from ..common.logit_functions import inverse_temperature

# Numbers per compact row.
FIELDS = 6


@triton.jit(do_not_specialize=["n", "blocks_per_program", "ignore_index", "capacity"])
def active_rows_kernel(
    logprob_ptr,  # [T], as the two others: gradients
    entropy_ptr,
    logsumexp_ptr,
    target_ptr,  # [T]
    counts_ptr,  # int32, one per program
    index_ptr,  # int32 [C], zeros
    slot_ptr,  # int32 [T]
    number_ptr,
    n,
    blocks_per_program,
    ignore_index,
    capacity,
    EVERY_VALID: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOGSUMEXP: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Counts the active rows of each program; numbers them where all are COUNTED.

    Active is a valid row where any gradient is not exactly 0, as a NaN is not; or EVERY_VALID row.
    """
    program = tl.program_id(0).to(tl.int64)
    others = tl.arange(0, MAX_PROGRAMS)
    before = (others < program) & COUNTED
    used = tl.sum(tl.load(counts_ptr + others, mask=before, other=0))
    for i in range(blocks_per_program):
        offs = (program * blocks_per_program + i) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < n
        any_grad = inside if EVERY_VALID else offs < 0
        if HAS_LOGPROB:
            any_grad |= tl.load(logprob_ptr + offs, mask=inside, other=0.0) != 0.0
        if HAS_ENTROPY:
            any_grad |= tl.load(entropy_ptr + offs, mask=inside, other=0.0) != 0.0
        if HAS_LOGSUMEXP:
            any_grad |= tl.load(logsumexp_ptr + offs, mask=inside, other=0.0) != 0.0
        valid = tl.load(target_ptr + offs, mask=inside, other=0) != ignore_index
        active = (inside & any_grad & valid).to(tl.int32)
        if COUNTED:
            slot = used + tl.cumsum(active, 0) - 1
            placed = (active != 0) & (slot < capacity)
            tl.store(index_ptr + slot, offs.to(tl.int32), mask=placed)
            tl.store(slot_ptr + offs, tl.where(placed, slot, -1), mask=inside)
        used += tl.sum(active)
    if not COUNTED:
        tl.store(counts_ptr + program, used)
    elif program == tl.num_programs(0) - 1:
        tl.store(number_ptr, used)


@triton.jit(do_not_specialize=["capacity"])
def find_front_kernel(
    index_ptr,  # [C], row numbers
    number_ptr,
    places_ptr,  # [T]
    place_ptr,  # [C]
    front_ptr,
    capacity,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The place of each active row, and how many come before the first without one."""
    n = tl.minimum(tl.load(number_ptr), capacity)
    front = n
    for start in tl.range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < n
        row = tl.load(index_ptr + offs, mask=inside, other=0)
        place = tl.load(places_ptr + row, mask=inside, other=-1)
        tl.store(place_ptr + offs, place, mask=inside)
        front = tl.minimum(front, tl.min(tl.where(place < 0, offs, n)))
    tl.store(front_ptr, tl.where(front < n, front // STEP * STEP, n))


@triton.jit(do_not_specialize=["stride_temperature", "capacity", "limit"])
def gather_kernel(
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
    """Copies rows of hidden states, and reduces all else to FIELDS numbers per row.

    More rows than `limit` make every gradient NaN.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    number = tl.load(number_ptr)
    mask = offs_c < tl.minimum(number, capacity)
    mask_out = offs_c < capacity
    row = tl.load(index_ptr + offs_c, mask=mask, other=0).to(tl.int64)
    inverse = inverse_temperature(temperature_ptr, stride_temperature, row, mask, HAS_TEMPERATURE)
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


@triton.jit(do_not_specialize=["limit", "T"])
def scatter_kernel(
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
    """Each row of T from its place in C; zeros for rows without one, NaN if C had no room."""
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
