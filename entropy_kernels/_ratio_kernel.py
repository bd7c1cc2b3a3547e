"""The clipped ratio loss by its kernel: when that fits, which one, and what comes of it.

B sequences, L their length.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._loss_options import find_loss
from .losses import LOG_RATIO_BOUND, clipped_ratio

# Its options in the op's order, and what they are unless told otherwise.
_OPTIONS = inspect.signature(clipped_ratio).parameters
_OWN = {name: _OPTIONS[name].default for name in ("clip_low", "clip_high", "dual_clip")}


def has_kernel(
    loss_type: object = "dapo", clip_low: object = None, clip_high: object = None
) -> bool:
    """Whether that loss is the fused kernel's, of which `impl` chooses one."""
    named = isinstance(loss_type, str) and find_loss(loss_type)[0] is clipped_ratio
    return named and not isinstance(clip_low, Tensor) and not isinstance(clip_high, Tensor)


def plain(impl: str) -> str:
    """For the losses that have no kernel."""
    if not isinstance(impl, str) or impl not in ("auto", "torch"):
        raise ValueError(
            f"impl={impl!r} is a kernel of the clipped ratio loss with clips that are numbers; "
            'other losses are plain PyTorch, impl "auto" or "torch"'
        )
    return "torch"


def clipped_by_kernel(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    factor: Tensor | None,
    kept: Tensor,
    scale_B: Tensor,
    clip: dict[str, Any],
    impl: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped ratio loss; it is linear in a factor >= 0 of the advantage."""
    if factor is not None:
        counts = kept & ((factor != 0) | advantage.isnan())
        advantage = torch.where(counts, advantage * factor, 0.0)
    shape = (1, new.numel()) if scale_B.numel() == 1 else tuple(new.shape)
    loss, _, sums, counts = ops.ratio_loss(
        *(x.reshape(shape) for x in (new, old, advantage, kept)),
        scale_B,
        *(own if clip[name] is None else clip[name] for name, own in _OWN.items()),
        LOG_RATIO_BOUND,
        impl,
    )
    among = kept.sum().clamp_min(1)
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
