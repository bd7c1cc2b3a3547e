"""Dot products of pairs of rows, and weighted sums of rows over runs of pairs with one place.

P pairs, D hidden.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P"])
def dots_kernel(
    left_ptr,  # [*, D]
    right_ptr,  # [*, D]
    i_ptr,  # [P], rows of left
    j_ptr,  # [P], rows of right
    keep_ptr,  # uint8 [P]
    out_ptr,  # fp32 [P]
    stride_lt,
    stride_ld,
    stride_rt,
    stride_rd,
    P,
    D,
    HAS_KEEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of pairs per program, in fp32; pairs that are not kept are not read and give 0."""
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = offs_p < P
    kept = inside
    if HAS_KEEP:
        kept &= tl.load(keep_ptr + offs_p, mask=inside, other=0) != 0
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    if tl.max(kept.to(tl.int32), 0) != 0:
        i = tl.load(i_ptr + offs_p, mask=kept, other=0).to(tl.int64)
        j = tl.load(j_ptr + offs_p, mask=kept, other=0).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        step_d = offs_d.to(tl.int64)[None, :]
        left_ptrs = left_ptr + i[:, None] * stride_lt + step_d * stride_ld
        right_ptrs = right_ptr + j[:, None] * stride_rt + step_d * stride_rd
        for start_d in range(0, D, BLOCK_D):
            mask = kept[:, None] & (offs_d < D - start_d)[None, :]
            a = tl.load(left_ptrs, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(right_ptrs, mask=mask, other=0.0).to(tl.float32)
            total += a * b
            left_ptrs += BLOCK_D * stride_ld
            right_ptrs += BLOCK_D * stride_rd
    tl.store(out_ptr + offs_p, tl.sum(total, 1), mask=inside)


@triton.jit
def _store_sum(out_ptr, place, stride_ot, stride_od, offs_d, mask_d, total, ADD: tl.constexpr):
    """A run's sum into its row of out, or onto it, rounded once."""
    ptrs = out_ptr + place.to(tl.int64) * stride_ot + offs_d.to(tl.int64) * stride_od
    if ADD:
        total += tl.load(ptrs, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["P", "chunk"])
def sums_kernel(
    scale_ptr,  # fp32 [P]
    rows_ptr,  # [*, D]
    i_ptr,  # [P], rows of rows
    place_ptr,  # [P], ascending
    out_ptr,  # [*, D]
    partials_ptr,  # fp32 [chunks, 2, D]
    live_ptr,  # int32 [chunks, 2]
    stride_rt,
    stride_rd,
    stride_ot,
    stride_od,
    P,
    D,
    chunk,
    ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The runs of a chunk of pairs, in a block of columns: whole ones into out, others in parts.

    A run that began in a chunk before leaves its part in the chunk's first row of partials. One
    that goes on behind the chunk leaves it in the second. A part is live, and written, where a
    scale is not 0. A whole run of zeros is not written either.
    """
    block, block_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = block * chunk
    last = tl.minimum(first + chunk, P)
    offs_d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    columns = offs_d.to(tl.int64)[None, :] * stride_rd
    before = tl.load(place_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(place_ptr + last, mask=last < P, other=-1)
    p = first
    while p < last:
        begin = p
        place = tl.load(place_ptr + begin)
        total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        number = 0
        found = BLOCK_P
        while found == BLOCK_P:
            offs_p = p + tl.arange(0, BLOCK_P)
            inside = offs_p < last
            same = inside & (tl.load(place_ptr + offs_p, mask=inside, other=-1) == place)
            scale = tl.load(scale_ptr + offs_p, mask=same, other=0.0)
            live = scale != 0.0
            i = tl.load(i_ptr + offs_p, mask=live, other=0).to(tl.int64)
            mask = live[:, None] & mask_d[None, :]
            x = tl.load(rows_ptr + i[:, None] * stride_rt + columns, mask=mask, other=0.0)
            # Beyond the mask, 0 * 0.
            total += scale[:, None] * x.to(tl.float32)
            number += tl.sum(live.to(tl.int32), 0)
            found = tl.sum(same.to(tl.int32), 0)
            p += found
        continued = (begin == first) & (place == before)
        goes_on = (p == last) & (place == after)
        if continued or goes_on:
            part = 2 * block + tl.where(continued, 0, 1)
            tl.store(live_ptr + part, number, mask=block_d == 0)
            if number > 0:
                tl.store(partials_ptr + part * D + offs_d, tl.sum(total, 0), mask=mask_d)
        elif number > 0:
            sums = tl.sum(total, 0)
            _store_sum(out_ptr, place, stride_ot, stride_od, offs_d, mask_d, sums, ADD)


@triton.jit(do_not_specialize=["P", "chunk"])
def merge_sums_kernel(
    place_ptr,  # [P], ascending
    partials_ptr,  # fp32 [chunks, 2, D]
    live_ptr,  # int32 [chunks, 2]
    out_ptr,  # [*, D]
    stride_ot,
    stride_od,
    P,
    D,
    chunk,
    ADD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The run that begins in a chunk and goes on behind it, from its parts in their order."""
    block = tl.program_id(0).to(tl.int64)
    first = block * chunk
    last = first + chunk
    if last >= P:
        return
    place = tl.load(place_ptr + last - 1)
    before = tl.load(place_ptr + first - 1, mask=first > 0, other=-1)
    if (tl.load(place_ptr + last) != place) | (before == place):
        return
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    number = 0
    # The part of this chunk is its second; those of the chunks that follow are their first.
    start = block
    found = BLOCK_C
    while found == BLOCK_C:
        offs_c = start + tl.arange(0, BLOCK_C)
        own = offs_c == block
        inside = offs_c * chunk < P
        begins = tl.load(place_ptr + offs_c * chunk, mask=inside & ~own, other=-1)
        same = own | (inside & (begins == place))
        part = 2 * offs_c + own.to(tl.int64)
        live = tl.load(live_ptr + part, mask=same, other=0) > 0
        mask = live[:, None] & mask_d[None, :]
        total += tl.load(partials_ptr + part[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        number += tl.sum(live.to(tl.int32), 0)
        found = tl.sum(same.to(tl.int32), 0)
        start += found
    if number > 0:
        sums = tl.sum(total, 0)
        _store_sum(out_ptr, place, stride_ot, stride_od, offs_d, mask_d, sums, ADD)
