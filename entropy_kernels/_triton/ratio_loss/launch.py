"""The clipped policy loss, its gradient and its metrics in one pass over the tokens, on a GPU.

Each program sums its tokens in fp64 and writes one row of partial sums; one program adds the rows
in their order. No atomics: the same bits every time. B sequences, L their length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selection.launch import MAX_PROGRAMS, partition

BLOCK = 512


@triton.jit
def _exponential(x):
    """exp(x) and exp(x) - 1 - x in fp32, |x| <= 80 or NaN.

    exp(x) = 2^n (1 + r + r^2 p(r)), r = x - n ln 2 in two parts. As csrc/cpu/ratio_loss.cpp does.
    """
    MAGIC: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, its low bits
    shifted = x * 1.44269504 + MAGIC
    n = shifted - MAGIC
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    # Chebyshev, |r| <= ln 2 / 2: within 7e-10 of exp(r).
    p = r * 1.98992871e-4 + 1.39336521e-3
    p = p * r + 8.33329838e-3
    p = p * r + 4.16664667e-2
    p = p * r + 1.66666672e-1
    p = p * r + 0.5
    p = p * r * r
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    far = power * (r + p) + (power - 1.0) - x
    return power * (1.0 + (r + p)), tl.where(n == 0.0, p, far)


@triton.jit
def _tokens_kernel(
    logprob_ptr,
    old_logprob_ptr,
    advantage_ptr,
    kept_ptr,
    weight_ptr,
    grad_ptr,
    partials_ptr,
    n,
    length,
    low,
    high,
    dual,
    bound,
    HAS_DUAL: tl.constexpr,
    ONE_SEQUENCE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    loss_sum = tl.zeros((BLOCK,), tl.float64)
    ratio_sum = tl.zeros((BLOCK,), tl.float64)
    log_ratio_sum = tl.zeros((BLOCK,), tl.float64)
    excess_sum = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.float32)
    low_count = tl.zeros((BLOCK,), tl.int32)
    high_count = tl.zeros((BLOCK,), tl.int32)
    active_count = tl.zeros((BLOCK,), tl.int32)
    for i in range(BLOCKS):
        offs = (program * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < n
        kept = tl.load(kept_ptr + offs, mask=inside, other=0) != 0
        # Loading only what is kept would load one value at a time.
        logprob = tl.where(kept, tl.load(logprob_ptr + offs, mask=inside, other=0.0), 0.0)
        old_logprob = tl.where(kept, tl.load(old_logprob_ptr + offs, mask=inside, other=0.0), 0.0)
        advantage = tl.where(kept, tl.load(advantage_ptr + offs, mask=inside, other=0.0), 0.0)
        if ONE_SEQUENCE:
            weight = tl.load(weight_ptr)
        else:
            weight = tl.load(weight_ptr + offs // length, mask=inside, other=0.0)

        # A NaN reaches the loss and the gradient.
        free = logprob - old_logprob
        log_ratio = tl.where(free > bound, bound, tl.where(free < -bound, -bound, free))
        ratio, excess = _exponential(log_ratio)
        plain = ratio * advantage
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
        loss = -tl.where(clipped < plain, clipped, plain)
        is_low = ratio < low
        if HAS_DUAL:
            most = -dual * advantage
            loss = tl.where((advantage < 0.0) & (most < loss), most, loss)
            is_low |= ratio > dual
        is_low &= advantage < 0.0
        is_high = (advantage > 0.0) & (ratio > high)
        flat = is_low | is_high | (advantage == 0.0) | (free > bound) | (free < -bound)
        flat &= plain == plain
        grad = tl.where(flat, 0.0, -plain * weight)
        tl.store(grad_ptr + offs, grad, mask=inside)

        kept_ratio = tl.where(kept, ratio, 0.0)
        loss_sum += loss.to(tl.float64) * weight.to(tl.float64)
        ratio_sum += kept_ratio.to(tl.float64)
        log_ratio_sum += log_ratio.to(tl.float64)
        excess_sum += excess.to(tl.float64)
        largest = tl.where(kept_ratio > largest, kept_ratio, largest)
        low_count += is_low.to(tl.int32)
        high_count += is_high.to(tl.int32)
        active_count += (grad != 0.0).to(tl.int32)

    partials_ptr += program
    tl.store(partials_ptr + 0 * MAX_PROGRAMS, tl.sum(loss_sum))
    tl.store(partials_ptr + 1 * MAX_PROGRAMS, tl.sum(ratio_sum))
    tl.store(partials_ptr + 2 * MAX_PROGRAMS, tl.max(largest).to(tl.float64))
    tl.store(partials_ptr + 3 * MAX_PROGRAMS, tl.sum(log_ratio_sum))
    tl.store(partials_ptr + 4 * MAX_PROGRAMS, tl.sum(excess_sum))
    tl.store(partials_ptr + 5 * MAX_PROGRAMS, tl.sum(low_count).to(tl.float64))
    tl.store(partials_ptr + 6 * MAX_PROGRAMS, tl.sum(high_count).to(tl.float64))
    tl.store(partials_ptr + 7 * MAX_PROGRAMS, tl.sum(active_count).to(tl.float64))


@triton.jit
def _finish_kernel(
    partials_ptr,
    loss_ptr,
    sums_ptr,
    counts_ptr,
    programs,
    MAX_PROGRAMS: tl.constexpr,
):
    offs = tl.arange(0, MAX_PROGRAMS)
    found = offs < programs
    partials_ptr += offs
    loss = tl.sum(tl.load(partials_ptr, mask=found, other=0.0))
    ratio = tl.sum(tl.load(partials_ptr + MAX_PROGRAMS, mask=found, other=0.0))
    largest = tl.max(tl.load(partials_ptr + 2 * MAX_PROGRAMS, mask=found, other=0.0))
    log_ratio = tl.sum(tl.load(partials_ptr + 3 * MAX_PROGRAMS, mask=found, other=0.0))
    excess = tl.sum(tl.load(partials_ptr + 4 * MAX_PROGRAMS, mask=found, other=0.0))
    # A maximum drops NaNs, a sum does not.
    largest = tl.where(ratio == ratio, largest, ratio)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(sums_ptr, ratio.to(tl.float32))
    tl.store(sums_ptr + 1, largest.to(tl.float32))
    tl.store(sums_ptr + 2, log_ratio.to(tl.float32))
    tl.store(sums_ptr + 3, excess.to(tl.float32))
    for i in tl.static_range(3):
        count = tl.sum(tl.load(partials_ptr + (5 + i) * MAX_PROGRAMS, mask=found, other=0.0))
        tl.store(counts_ptr + i, count.to(tl.int64))


def ratio_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    advantage_BL: Tensor,
    kept_BL: Tensor,
    weight_B: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_bound: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_torch.ratio_loss`, of fp32, with sums in fp64: 17 bytes a token, two launches.

    What is not contiguous is copied. Beside its results it holds 64 KB.
    """
    assert 0 < log_ratio_bound <= 80
    logprob, old_logprob, advantage, kept, weight = (
        x.contiguous() for x in (logprob_BL, old_logprob_BL, advantage_BL, kept_BL, weight_B)
    )
    n, device = logprob.numel(), logprob.device
    programs, blocks = partition(n, BLOCK)
    grad_BL = torch.empty_like(logprob)
    partials = torch.empty(8, MAX_PROGRAMS, dtype=torch.float64, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(4, dtype=torch.float32, device=device)
    counts = torch.empty(3, dtype=torch.int64, device=device)
    with device.on(device):
        if programs:
            _tokens_kernel[(programs,)](
                logprob,
                old_logprob,
                advantage,
                kept.view(torch.uint8),
                weight,
                grad_BL,
                partials,
                n,
                logprob.shape[1],
                1.0 - clip_low,
                1.0 + clip_high,
                dual_clip,
                log_ratio_bound,
                HAS_DUAL=dual_clip is not None,
                ONE_SEQUENCE=logprob.shape[0] == 1,
                BLOCKS=blocks,
                BLOCK=BLOCK,
                MAX_PROGRAMS=MAX_PROGRAMS,
                num_warps=4,
                enable_fp_fusion=True,
            )
        _finish_kernel[(1,)](
            partials,
            loss,
            sums,
            counts,
            programs,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return loss, grad_BL, sums, counts
