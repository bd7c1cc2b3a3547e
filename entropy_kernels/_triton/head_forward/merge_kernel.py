"""Results of every row, from the partial sums of its vocabulary splits.

T tokens, V vocabulary, S vocabulary splits.
"""

import triton
import triton.language as tl

from ..common.logit_functions import LN2, LOG2E, LOWEST, log1p
from .row_sum_functions import empty_sums, moved_sums
from .statistics_functions import finish_statistics, merged_logits, moved_statistics


@triton.jit(
    do_not_specialize=["stride_temperature", "first_t", "end_t", "T", "n_split", "ignore_index"]
)
def merge_kernel(
    partials_ptr,  # [4, S, T]; with statistics [9, S, T]
    target_logit_ptr,  # [T], as partials in the order of slots
    slot_ptr,  # [T], where partials have each row; -1 for rows without a target
    target_ptr,  # [T]
    temperature_ptr,
    logprob_ptr,  # [T], as the four that follow
    entropy_ptr,
    logsumexp_ptr,
    max_ptr,
    log_sum_ptr,
    statistics_ptr,  # [6, T]
    stride_temperature,
    first_t,
    end_t,
    T,
    V,
    n_split,
    ignore_index,
    HAS_SLOTS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Results in nats: zeros where the target is ignored, NaN where a row has no answer."""
    offs_t = first_t + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < end_t
    target = tl.load(target_ptr + offs_t, mask=mask_t, other=0)
    valid = mask_t & (target != ignore_index)
    slot = offs_t
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + offs_t, mask=valid, other=0)
    temperature = tl.full([BLOCK_T], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        offs = offs_t.to(tl.int64) * stride_temperature
        temperature = tl.load(temperature_ptr + offs, mask=mask_t, other=1.0)
    scale = LOG2E / temperature
    m, n, s, u, w, q, r, mean, first = empty_sums(BLOCK_T)
    field = tl.cast(n_split, tl.int64) * T

    for start in range(0, n_split, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_split)[:, None] & valid[None, :]
        ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * T + slot[None, :]
        m_ST = tl.load(ptrs, mask=mask, other=LOWEST)
        n_ST = tl.load(ptrs + field, mask=mask, other=0.0)
        s_ST = tl.load(ptrs + 2 * field, mask=mask, other=0.0)
        u_ST = tl.load(ptrs + 3 * field, mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(m_ST, 0))
        if STATISTICS:
            w_ST = tl.load(ptrs + 4 * field, mask=mask, other=0.0)
            q_ST = tl.load(ptrs + 5 * field, mask=mask, other=0.0)
            r_ST = tl.load(ptrs + 6 * field, mask=mask, other=0.0)
            w_ST, q_ST, r_ST = moved_statistics(
                m_ST, n_ST, s_ST, u_ST, w_ST, q_ST, r_ST, scale[None, :], top[None, :]
            )
            w, q, r = moved_statistics(m, n, s, u, w, q, r, scale, top)
            w += tl.sum(w_ST, 0)
            q += tl.sum(q_ST, 0)
            r += tl.sum(r_ST, 0)
        n_ST, s_ST, u_ST = moved_sums(m_ST, n_ST, s_ST, u_ST, scale[None, :], top[None, :])
        n, s, u = moved_sums(m, n, s, u, scale, top)
        n += tl.sum(n_ST, 0)
        s += tl.sum(s_ST, 0)
        u += tl.sum(u_ST, 0)
        m = top

    rest = s + (n - 1.0)
    # A row of -inf throughout has no maximum, and a negative rest.
    rest = tl.where(rest < 0.0, 0.0, rest)
    log_sum = log1p(rest)
    entropy = log_sum - LN2 * u / (1.0 + rest)
    logprob = (tl.load(target_logit_ptr + slot, mask=valid, other=0.0) - m) / temperature
    # The target's logit was summed in another order, and may exceed the maximum by a rounding.
    logprob = tl.where(logprob > 0.0, 0.0, logprob) - log_sum
    logsumexp = m / temperature + log_sum

    defined = (m > LOWEST) & (target >= 0) & (target < V) & (rest == rest)
    defined &= (temperature > 0.0) & (temperature < float("inf"))
    # NaN for rows without an answer.
    factor = tl.where(defined, 1.0, float("nan"))
    tl.store(logprob_ptr + offs_t, tl.where(valid, logprob * factor, 0.0), mask=mask_t)
    tl.store(entropy_ptr + offs_t, tl.where(valid, entropy * factor, 0.0), mask=mask_t)
    tl.store(logsumexp_ptr + offs_t, tl.where(valid, logsumexp * factor, 0.0), mask=mask_t)
    tl.store(max_ptr + offs_t, tl.where(valid, m * factor, 0.0), mask=mask_t)
    tl.store(log_sum_ptr + offs_t, tl.where(valid, log_sum * factor, 0.0), mask=mask_t)
    if STATISTICS:
        mean, first = merged_logits(partials_ptr, slot, valid, T, n_split, m, mean, first, BLOCK_S)
        finish_statistics(
            statistics_ptr,
            offs_t,
            mask_t,
            T,
            n,
            rest,
            u,
            w,
            q,
            r,
            log_sum,
            mean / temperature,
            first == target,
            valid,
            factor,
        )
