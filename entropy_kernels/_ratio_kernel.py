"""The clipped ratio loss by its kernel: which one runs, and what comes of it.

B sequences, L their length.
"""

import inspect

import torch
from torch import Tensor

from . import ops
from ._loss_tokens import Tokens
from .losses import LOG_RATIO_BOUND, clipped_ratio

# The clips of `clipped_ratio`, unless told otherwise.
_DEFAULTS = inspect.signature(clipped_ratio).parameters
CLIP_LOW, CLIP_HIGH = _DEFAULTS["clip_low"].default, _DEFAULTS["clip_high"].default


def plain(impl: str) -> str:
    """For the losses that have no kernel."""
    if not isinstance(impl, str) or impl not in ("auto", "torch"):
        raise ValueError(
            f"impl={impl!r} is a kernel of the clipped ratio loss with clips that are numbers; "
            'other losses are plain PyTorch, impl "auto" or "torch"'
        )
    return "torch"


def clipped_by_kernel(
    tokens: Tokens,
    factor: Tensor | None,
    scale_B: Tensor,
    dual_clip: float | None,
    impl: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped ratio loss of the selected tokens, linear in a factor >= 0 of the advantage.

    tokens.old_logprob is given, and the clips are numbers or None.
    """
    selected, advantage = tokens.selected, tokens.advantage
    if factor is not None:
        counts = selected & ((factor != 0) | advantage.isnan())
        advantage = torch.where(counts, advantage * factor, 0.0)
    logprob, old_logprob = tokens.logprob, tokens.old_logprob
    assert old_logprob is not None
    shape = (1, logprob.numel()) if scale_B.numel() == 1 else tuple(logprob.shape)
    loss, _, sums, counts = ops.ratio_loss(
        *(x.reshape(shape) for x in (logprob, old_logprob, advantage, selected)),
        scale_B,
        CLIP_LOW if tokens.clip_low is None else tokens.clip_low,
        CLIP_HIGH if tokens.clip_high is None else tokens.clip_high,
        dual_clip,
        LOG_RATIO_BOUND,
        impl,
    )
    among = selected.sum().clamp_min(1)
    low, high, _ = (counts / among).unbind()
    clipped = {"clip/low": low, "clip/high": high, "head/active_rows": counts[2]}
    return loss, of_ratios(sums, among) | clipped


def of_ratios(sums: Tensor, among: Tensor) -> dict[str, Tensor]:
    """Metrics from sums of r, its largest, log r and r - 1 - log r; `among` so many tokens."""
    mean_ratio, _, mean_log_ratio, mean_excess = (sums / among).unbind()
    return {
        "ratio/mean": mean_ratio,
        "ratio/max": sums[1],
        "kl/k1": -mean_log_ratio,
        "kl/k3": mean_excess,
    }
