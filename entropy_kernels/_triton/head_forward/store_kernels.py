"""The places of rows of high entropy, and copies of their logits for backward.

V vocabulary.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "room", "ignore_index"])
def place_rows_kernel(
    entropy_ptr,  # [rows of the chunk], as the two others
    target_ptr,
    above_ptr,
    used_ptr,
    places_ptr,
    n,
    room,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """One program for all rows of a chunk. A NaN is above no threshold."""
    above = tl.load(above_ptr)
    used = tl.load(used_ptr)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < n
        entropy = tl.load(entropy_ptr + offs, mask=inside, other=0.0)
        target = tl.load(target_ptr + offs, mask=inside, other=0)
        valid = (inside & (entropy >= above) & (target != ignore_index)).to(tl.int32)
        place = used + tl.cumsum(valid, 0) - 1
        placed = (valid != 0) & (place < room)
        tl.store(places_ptr + offs, tl.where(placed, place, -1), mask=inside)
        used += tl.sum(valid)
    tl.store(used_ptr, used)


@triton.jit
def copy_rows_kernel(
    logits_ptr,  # [rows of the chunk, V]
    places_ptr,
    out_ptr,  # [places, V]
    V,
    COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row and COLUMNS of it; it ends at once where the row has no place."""
    splits = tl.cdiv(V, COLUMNS)
    row = (tl.program_id(0) // splits).to(tl.int64)
    place = tl.load(places_ptr + row).to(tl.int64)
    if place < 0:
        return
    first = tl.program_id(0) % splits * COLUMNS
    for start in range(0, COLUMNS, BLOCK_V):
        offs_v = first + start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + row * V + offs_v, mask=offs_v < V, other=0.0)
        tl.store(out_ptr + place * V + offs_v, z, mask=offs_v < V)
