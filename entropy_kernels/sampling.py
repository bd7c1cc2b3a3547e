"""What a sampler knows of the logits that it draws from: entropies, and the ids that it keeps.

Nothing here is differentiable. R rows, V vocabulary, N pairs of a row and an id of its set.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, backends
from ._arguments import check_number, check_tensor, check_values, check_whole, shown
from ._shapes import Float, Int
from ._torch import sampling as torch_sampling
from .support import Support

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP32 = torch.finfo(torch.float32)


class Truncated(NamedTuple):
    """The distributions that truncation leaves, renormalised over each row's set."""

    support: Support
    """The ids that are kept of each row, int64, from the most probable one on."""
    logprob: Float[Tensor, " N"]
    """The log-probability of each id within its set, fp32, nats."""
    entropy: Float[Tensor, " R"]
    """The entropy over each set, fp32, nats."""


def entropy_from_logits(
    logits: Float[Tensor, "R V"],
    temperature: float | Float[Tensor, " R"] = 1.0,
    *,
    impl: str = "auto",
) -> Float[Tensor, " R"]:
    """The entropy of softmax(logits / temperature) of each row, in nats.

    With m the largest logit of a row and d = (logits - m) / temperature,

        s = sum of exp(d) without one maximum,   t = sum of d exp(d),   H = log1p(s) - t / (1 + s)

    Neither term of H is negative, so that small entropies keep their digits.

    Args:
        logits: fp32, bf16 or fp16, contiguous along V; they are not copied. Entries of -inf, such
            as a mask's, have no probability. A row of -inf throughout, or with NaN or inf, is NaN.
        temperature: > 0, a number or one per row. Give 1 for rows that are drawn greedily.
        impl: "cpu", compiled, takes a CPU; "triton" a GPU, and "cuda" is the same; "torch" any
            device, in blocks of bounded memory. "auto" is the fastest one known to be right there.

    Returns fp32 [R]. Nothing waits for a GPU.

    Raises:
        ValueError: another dtype or shape, a temperature that is not > 0, an unknown `impl` or one
            that cannot run there.
    """
    _check_logits(logits)
    temperature_R = _temperature(temperature, logits)
    name = backends.resolve("entropy_from_logits", impl, logits.device, logits.dtype)
    with torch.no_grad():
        return _kernel(name)(logits.detach(), temperature_R)


def truncate(
    logits: Float[Tensor, "R V"],
    temperature: float | Float[Tensor, " R"] = 1.0,
    *,
    top_k: int | Int[Tensor, " R"] = 0,
    top_p: float | Float[Tensor, " R"] = 1.0,
    min_p: float | Float[Tensor, " R"] = 0.0,
) -> Truncated:
    """The ids that min-p, top-k and top-p leave of each row, and their distribution.

    The order is vLLM's. The temperature comes first. Min-p keeps ids that are at least `min_p`
    times as probable as the first. Top-k keeps the `top_k` most probable of these. Top-p keeps the
    fewest of these whose share of their mass reaches `top_p`, at least one. Equal logits are in the
    order of their ids, so a set has at most `top_k` ids. vLLM and transformers keep all that equal
    the `top_k`-th. Ids with a logit of -inf are in no set; all others are where all three are off.

    Args:
        logits: fp32, bf16 or fp16. A row of -inf throughout, or with NaN or inf, gives a set of one
            with NaN.
        temperature: as in `entropy_from_logits`.
        top_k, top_p, min_p: a number or one per row; 0, 1.0 and 0.0 are off.

    Probabilities are fp32 and their sums fp64. On a CPU the largest logits are picked, and a block
    of rows is sorted where they do not suffice. A GPU sorts, and is waited for once per 2**24
    logits. Beyond the result, memory is bounded: 40 bytes per logit of such a block.

    Raises:
        ValueError: another dtype or shape, or values outside of their ranges.
    """
    _check_logits(logits)
    temperature_R = _temperature(temperature, logits)
    count, vocabulary = logits.shape
    top_k_R = _per_row("top_k", top_k, logits, torch.int64)
    top_k_R = top_k_R.where((top_k_R > 0) & (top_k_R < vocabulary), vocabulary)
    top_p_R = _per_row("top_p", top_p, logits, torch.float64)
    min_p_R = _per_row("min_p", min_p, logits, torch.float32)
    if count == 0:
        nothing = logits.new_empty(0, dtype=torch.float32)
        return Truncated(Support.of([], logits.device), nothing, nothing)
    with torch.no_grad():
        kept = torch_sampling.truncate(
            logits.detach(), temperature_R, torch_sampling.Limits(top_k_R, top_p_R, min_p_R)
        )
    zero = kept.sizes.new_zeros(1)
    support = Support(kept.token_ids, torch.cat([zero, kept.sizes.cumsum(0)]))
    return Truncated(support, kept.logprob, kept.entropy)


def _kernel(impl: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The backend's entropies of logits; all take and return what `_torch.sampling`'s does."""
    if impl in ("triton", "cuda"):
        from ._triton.sampling.launch import entropy_from_logits as of_triton

        return of_triton
    return _native.entropy_from_logits if impl == "cpu" else torch_sampling.entropy_from_logits


def _check_logits(logits: Tensor) -> None:
    check_tensor("logits", logits)
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be fp32, bf16 or fp16; got {shown(logits)}")
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.stride(1) != 1 < logits.shape[1]:
        raise ValueError(
            "logits must be [R, V], contiguous along V, of one token or more; got "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )


def _temperature(temperature: float | Tensor, logits: Tensor) -> Tensor | None:
    """fp32, one per row or one; None for 1."""
    wanted = "a finite number > 0, or a tensor of one per row"
    if isinstance(temperature, Tensor):
        _check_rows("temperature", temperature, logits)
        check_values("temperature", temperature, wanted, _FP32.tiny, _FP32.max)
        return temperature.detach().float().contiguous()
    check_number("temperature", temperature, wanted, lambda x: _FP32.tiny <= x <= _FP32.max)
    return None if temperature == 1 else torch.full((1,), temperature, device=logits.device)


def _per_row(name: str, value: float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """One limit per row: whole numbers, or shares in [0, 1]."""
    whole = not dtype.is_floating_point
    wanted = f"a {'whole number >= 0' if whole else 'number in [0, 1]'}, or a tensor of one per row"
    if isinstance(value, Tensor):
        _check_rows(name, value, logits, whole)
        check_values(name, value, wanted, 0, float("inf") if whole else 1)
        return value.detach().to(dtype)
    if whole:
        check_whole(name, value, 0, wanted)
    else:
        check_number(name, value, wanted, lambda x: 0 <= x <= 1)
    return torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)


def _check_rows(name: str, x: Tensor, logits: Tensor, whole: bool = False) -> None:
    fits = not (x.is_floating_point() or x.dtype == torch.bool) if whole else x.is_floating_point()
    if not fits or x.shape != logits.shape[:1] or x.device != logits.device:
        raise ValueError(
            f"{name} must be {'whole numbers' if whole else 'floating-point'}, "
            f"[{logits.shape[0]}], one per row, on {logits.device}; got {shown(x)}"
        )
