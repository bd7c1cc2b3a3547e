"""The policy loss on per-token log-probabilities: counts and weights, then the op.

B sequences, L their length.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entropy_kernels import _gpu, _native, ops

LOSS_TYPES = ("dapo", "grpo")
# |log ratio| is clamped here before exp, as verl does; beyond, the ratio is meaningless.
LOG_RATIO_BOUND = 20.0


def ratio_loss(
    logprob: Float[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"] | None,
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    selected: Bool[Tensor, "*tokens"] | None = None,
    loss_type: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    denominator: str | float | Tensor = "selected",
    num_sequences: float | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The clipped policy loss of PPO, GRPO and DAPO over the selected tokens.

    r_t = exp(logprob_t - old_logprob_t)
    loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    and, with dual clip c, for A_t < 0: min(loss_t, -c A_t).

    loss_type "dapo" (DAPO, arXiv 2503.14476; arXiv 2506.01939v2, equation 6): the sum over the
    selected tokens, over one count of tokens: the `denominator`.
    loss_type "grpo" (DeepSeekMath, arXiv 2402.03300): each sequence's sum over its own count, then
    the mean over the sequences with a token of the loss mask, or over `num_sequences`.

    Differentiable once, with respect to logprob; its gradient is found in the same pass. A token
    whose ratio is clipped, whose advantage is zero, or that is not selected gets a gradient of
    exactly zero, whatever its logprob (inf and NaN included); so does one whose |log ratio|
    passes 20, where it is clamped. On a bound itself a ratio counts as inside. A NaN among the
    selected tokens makes the loss NaN, and that token's gradient unless its advantage is zero. No
    selected token: the loss is 0, its gradients too.

    Args:
        logprob: with gradient; computed in fp32, or in fp64 where it is fp64. [B, L] for "grpo".
        old_logprob: of the sampling policy, without gradient; None: on-policy, ratio 1.
        advantage: one a token, or [B] where logprob is [B, L].
        mask: the loss mask: false for prompt, padding and tool tokens.
        selected: the tokens to train on, a subset is formed with `mask`; None: all of the mask.
        dual_clip: c > 1 (10 in the paper's scripts), or None.
        denominator: "selected" (paper v2 and its code), "all" tokens of the mask (paper v1, TRL),
            or for "dapo" a count: that of the whole step, so that the sum over micro-batches and
            ranks equals one batch.
        num_sequences: for "grpo", the number of sequences of the whole step, to the same end.
        impl: "auto", what fits of the following; "cpu", the compiled kernel, for fp32 on a CPU;
            "triton", fp32 on a GPU (by itself only where it was found to be right on that kind of
            GPU); or "torch", any device.

    Returns:
        The loss, and metrics as 0-dim tensors without gradient: clip/low, clip/high (share of the
        selected tokens whose gradient was clipped away; clip/low includes the dual clip),
        ratio/mean, ratio/max, kl/k1, kl/k3 (estimates of KL(old || new) over the selected tokens),
        entropy/kept_fraction (selected over mask), head/active_rows (tokens whose gradient is not
        zero), tokens/all, tokens/kept.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown loss_type, denominator or
            impl, a clip range or dual_clip out of bounds.
    """
    selected = mask if selected is None else selected
    _check_tensors(logprob, old_logprob, advantage, mask, selected)
    _check_aggregation(logprob, loss_type, denominator, num_sequences)
    _check_clip(clip_low, clip_high, dual_clip)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    name = _resolve(impl, logprob.device, dtype)
    kept = mask & selected
    counted = mask if isinstance(denominator, str) and denominator == "all" else kept
    shape: tuple[int, ...] = logprob.shape
    if loss_type == "dapo":
        shape = (1, logprob.numel())
        count = counted.sum() if isinstance(denominator, str) else denominator
        weight = 1 / _at_least_one(count, logprob.device, dtype)
    else:
        sequences = mask.any(1).sum() if num_sequences is None else num_sequences
        sequences = _at_least_one(sequences, logprob.device, dtype)
        weight = 1 / (counted.sum(1).clamp_min(1) * sequences)
    old = (logprob if old_logprob is None else old_logprob).detach()
    loss, _, sums, counts = ops.ratio_loss(
        *(x.to(dtype).reshape(shape) for x in (logprob, old, _per_token(advantage, logprob))),
        kept.reshape(shape),
        weight,
        clip_low,
        clip_high,
        dual_clip,
        LOG_RATIO_BOUND,
        name,
    )
    return loss, _metrics(sums, counts, kept.sum(), mask.sum())


def _at_least_one(count: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1]; a number stays what it is."""
    if isinstance(count, Tensor):
        return count.detach().to(device, dtype).clamp_min(1).reshape(1)
    return torch.full((1,), count, device=device, dtype=dtype)


def _resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that "auto" stands for."""
    built, fp32 = ops.IMPLEMENTATIONS, dtype == torch.float32
    on_cpu = fp32 and device.type == "cpu"
    if impl == "auto":
        if fp32 and _gpu.verified(device):
            return "triton"
        return "cpu" if on_cpu and "cpu" in built else "torch"
    if impl == "cpu" and "cpu" not in built:
        raise ValueError(f'impl="cpu" is missing: {_native.why_missing("cpu")}')
    names = ("auto", *built) if "triton" in built else ("auto", *built, "triton")
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(names)}; got {impl!r}")
    if impl == "cpu" and not on_cpu:
        raise ValueError(f'impl="cpu" needs fp32 tensors on the CPU; got {dtype} on {device}')
    if impl == "triton" and (why := _gpu.why_not(device)) is not None:
        raise ValueError(f'impl="triton" cannot run: {why}')
    if impl == "triton" and not fp32:
        raise ValueError(f'impl="triton" needs fp32 tensors; got {dtype}')
    return impl


def _per_token(advantage: Tensor, logprob: Tensor) -> Tensor:
    if advantage.shape == logprob.shape:
        return advantage.detach()
    if logprob.ndim == 2 and advantage.shape == logprob.shape[:1]:
        return advantage.detach().unsqueeze(1).expand_as(logprob)
    raise ValueError(
        f"advantage must have logprob's shape {tuple(logprob.shape)}, or be [B] where logprob is "
        f"[B, L]; got {tuple(advantage.shape)}"
    )


def _metrics(sums: Tensor, counts: Tensor, kept: Tensor, valid: Tensor) -> dict[str, Tensor]:
    among = kept.clamp_min(1)
    mean_ratio, _, mean_log_ratio, mean_excess = (sums / among).unbind()
    low, high, _ = (counts / among).unbind()
    return {
        "clip/low": low,
        "clip/high": high,
        "ratio/mean": mean_ratio,
        "ratio/max": sums[1],
        "kl/k1": -mean_log_ratio,
        "kl/k3": mean_excess,
        "entropy/kept_fraction": kept / valid.clamp_min(1),
        "head/active_rows": counts[2],
        "tokens/all": valid,
        "tokens/kept": kept,
    }


def _check_tensors(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    selected: Tensor,
) -> None:
    like = {"old_logprob": old_logprob, "mask": mask, "selected": selected}
    for name, x in (like | {"advantage": advantage}).items():
        if x is not None and x.device != logprob.device:
            raise ValueError(f"{name} must be on {logprob.device}, like logprob; got {x.device}")
    for name, x in like.items():
        if x is not None and x.shape != logprob.shape:
            raise ValueError(
                f"{name} must have logprob's shape {tuple(logprob.shape)}; got {tuple(x.shape)}"
            )
    for name, x in {"mask": mask, "selected": selected}.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor; got {x.dtype}")


def _check_aggregation(
    logprob: Tensor,
    loss_type: str,
    denominator: str | float | Tensor,
    num_sequences: float | Tensor | None,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}")
    if isinstance(denominator, str) and denominator not in ("selected", "all"):
        raise ValueError(f'denominator must be "selected", "all" or a count; got {denominator!r}')
    for name, count in {"denominator": denominator, "num_sequences": num_sequences}.items():
        if isinstance(count, int | float) and not count > 0:
            raise ValueError(f"{name} must be > 0; got {count}")
    if loss_type == "grpo" and not isinstance(denominator, str):
        raise ValueError(
            'with loss_type="grpo" denominator must be "selected" or "all", each sequence has its '
            f"own count (num_sequences takes the step's); got {denominator!r}"
        )
    if loss_type == "grpo" and logprob.ndim != 2:
        raise ValueError(f'loss_type="grpo" needs [B, L] inputs; got {tuple(logprob.shape)}')
    if loss_type == "dapo" and num_sequences is not None:
        raise ValueError('num_sequences has a meaning with loss_type="grpo" only')


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            "clip_low must lie in [0, 1] and clip_high be >= 0; "
            f"got clip_low={clip_low}, clip_high={clip_high}"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None; got {dual_clip}")
