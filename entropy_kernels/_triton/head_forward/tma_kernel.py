"""Partial sums of the rows of h W^T + b, from tiles that tensor descriptors bring.

T tokens, D hidden, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LOG2E, LOWEST, add_bias, cap, dot, inverse_temperature, order
from .row_sum_functions import empty_sums, store_sums, sums_of_tile, update_statistics, update_sums
from .statistics_functions import NOWHERE, logits_of_tile, statistics_of_tile, store_statistics


@triton.jit(do_not_specialize=["stride_temperature", "T", "n_split"])
def forward_tma_kernel(
    hidden_desc,  # blocks of [BLOCK_T, BLOCK_D] of the valid rows
    weight_desc,  # blocks of [BLOCK_V, BLOCK_D]
    bias_ptr,
    temperature_ptr,  # of the valid rows
    number_ptr,
    partials_ptr,  # [4, S, T]; with statistics [9, S, T]
    stride_temperature,
    T,
    D,
    V,
    n_split,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Each program takes every num_programs-th unit: a block of rows, a split of TILES blocks.

    A unit's sums are carried from tile to tile and stored after each of them. With a branch that
    stores only the last, the compiler neither specialises warps nor avoids spills.
    """
    if FLATTEN:
        # Otherwise the loop gets a second body, for sums of no products.
        tl.assume(D > 0)
    n_rows = tl.load(number_ptr)
    n_blocks = tl.cdiv(n_rows, BLOCK_T)
    n_units = n_blocks * n_split
    pid = tl.program_id(0)
    n_steps = tl.cdiv(n_units - pid, tl.num_programs(0)) * TILES
    m, n, s, u, w, q, r, mean, first = empty_sums(BLOCK_T)

    for step in tl.range(0, n_steps, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        unit = pid + step // TILES * tl.num_programs(0)
        tile = step % TILES
        block, split = order(unit, n_blocks, n_split, GROUP_T)
        start_t = block * BLOCK_T
        start_v = (split * TILES + tile) * BLOCK_V
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for start_d in range(0, D, BLOCK_D):
            a = hidden_desc.load([start_t, start_d])
            b = weight_desc.load([start_v, start_d])
            acc = dot(a, b.T, acc, UPCAST)

        offs_t = start_t + tl.arange(0, BLOCK_T)
        offs_v = start_v + tl.arange(0, BLOCK_V)
        scale = LOG2E * inverse_temperature(
            temperature_ptr, stride_temperature, offs_t, offs_t < n_rows, HAS_TEMPERATURE
        )
        z = cap(add_bias(acc, bias_ptr, offs_v, V, HAS_BIAS), softcap, HAS_SOFTCAP)
        z = tl.where((offs_v < V)[None, :], z, LOWEST)
        if TILES > 1:
            begins = tile == 0
            m = tl.where(begins, LOWEST, m)
            n = tl.where(begins, 0.0, n)
            s = tl.where(begins, 0.0, s)
            u = tl.where(begins, 0.0, u)
            if STATISTICS:
                w = tl.where(begins, 0.0, w)
                q = tl.where(begins, 0.0, q)
                r = tl.where(begins, 0.0, r)
                mean = tl.where(begins, 0.0, mean)
                first = tl.where(begins, NOWHERE, first)
                m, n, s, u, w, q, r, mean, first = update_statistics(
                    m, n, s, u, w, q, r, mean, first, z, scale, offs_v, V
                )
                store_statistics(
                    partials_ptr, split, n_split, offs_t, n_rows, T, w, q, r, mean, first
                )
            else:
                m, n, s, u = update_sums(m, n, s, u, z, scale)
            store_sums(partials_ptr, split, n_split, offs_t, n_rows, T, m, n, s, u)
        else:
            # Nothing is carried from tile to tile, as warp specialisation in Triton 3.6 demands:
            # a loop that carries something becomes empty there.
            top = tl.maximum(tl.max(z, 1), LOWEST)
            ties, rest, product = sums_of_tile(z, top, scale)
            store_sums(partials_ptr, split, n_split, offs_t, n_rows, T, top, ties, rest, product)
            if STATISTICS:
                w, q, r = statistics_of_tile(z, top, scale)
                mean, first = logits_of_tile(z, top, offs_v, V)
                store_statistics(
                    partials_ptr, split, n_split, offs_t, n_rows, T, w, q, r, mean, first
                )
