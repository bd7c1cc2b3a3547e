"""The clipped policy loss, its gradient and its partial sums; and the total of those.

B sequences, L their length.
"""

import triton
import triton.language as tl


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
def tokens_kernel(
    logprob_ptr,
    old_logprob_ptr,
    advantage_ptr,
    selected_ptr,
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
        selected = tl.load(selected_ptr + offs, mask=inside, other=0) != 0
        # A masked load of what is selected would load one value at a time.
        logprob = tl.where(selected, tl.load(logprob_ptr + offs, mask=inside, other=0.0), 0.0)
        old_logprob = tl.where(
            selected, tl.load(old_logprob_ptr + offs, mask=inside, other=0.0), 0.0
        )
        advantage = tl.where(selected, tl.load(advantage_ptr + offs, mask=inside, other=0.0), 0.0)
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

        selected_ratio = tl.where(selected, ratio, 0.0)
        loss_sum += loss.to(tl.float64) * weight.to(tl.float64)
        ratio_sum += selected_ratio.to(tl.float64)
        log_ratio_sum += log_ratio.to(tl.float64)
        excess_sum += excess.to(tl.float64)
        largest = tl.where(selected_ratio > largest, selected_ratio, largest)
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
def finish_kernel(
    partials_ptr,
    loss_ptr,
    sums_ptr,
    counts_ptr,
    programs,
    MAX_PROGRAMS: tl.constexpr,
):
    offs = tl.arange(0, MAX_PROGRAMS)
    there = offs < programs
    partials_ptr += offs
    loss = tl.sum(tl.load(partials_ptr, mask=there, other=0.0))
    ratio = tl.sum(tl.load(partials_ptr + MAX_PROGRAMS, mask=there, other=0.0))
    largest = tl.max(tl.load(partials_ptr + 2 * MAX_PROGRAMS, mask=there, other=0.0))
    log_ratio = tl.sum(tl.load(partials_ptr + 3 * MAX_PROGRAMS, mask=there, other=0.0))
    excess = tl.sum(tl.load(partials_ptr + 4 * MAX_PROGRAMS, mask=there, other=0.0))
    # A maximum drops NaNs, a sum does not.
    largest = tl.where(ratio == ratio, largest, ratio)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(sums_ptr, ratio.to(tl.float32))
    tl.store(sums_ptr + 1, largest.to(tl.float32))
    tl.store(sums_ptr + 2, log_ratio.to(tl.float32))
    tl.store(sums_ptr + 3, excess.to(tl.float32))
    for i in tl.static_range(3):
        count = tl.sum(tl.load(partials_ptr + (5 + i) * MAX_PROGRAMS, mask=there, other=0.0))
        tl.store(counts_ptr + i, count.to(tl.int64))
