"""The clipped policy loss, its gradient and its metrics in one pass, by csrc/cuda/ratio_loss.cu.

B sequences, L their length.
"""

import torch
from torch import Tensor

from .. import device
from .arguments import Given, check, pointer, stream
from .module import cuda


def ratio_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    advantage_BL: Tensor,
    selected_BL: Tensor,
    weight_B: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_bound: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_torch.ratio_loss`, on fp32, with sums in fp64: 17 bytes per token, two launches.

    Tensors that are not contiguous are copied. Beside its results it allocates 64 KB.
    """
    assert 0 < log_ratio_bound <= 80
    module, shape, on = cuda(), tuple(logprob_BL.shape), logprob_BL.device
    inputs: dict[str, Given] = {
        "logprob": (logprob_BL.contiguous(), torch.float32, shape),
        "old_logprob": (old_logprob_BL.contiguous(), torch.float32, shape),
        "advantage": (advantage_BL.contiguous(), torch.float32, shape),
        "selected": (selected_BL.contiguous(), torch.bool, shape),
        "weight": (weight_B.contiguous(), torch.float32, shape[:1]),
    }
    given = check("ratio_loss", logprob_BL, inputs)
    results = {
        "grad": torch.empty(shape, dtype=torch.float32, device=on),
        "partials": torch.empty(8, module.loss_blocks, dtype=torch.float64, device=on),
        "loss": torch.empty((), dtype=torch.float32, device=on),
        "sums": torch.empty(4, dtype=torch.float32, device=on),
        "counts": torch.empty(3, dtype=torch.int64, device=on),
    }
    loss = module.RatioLoss(
        **given,
        **{name: pointer(x) for name, x in results.items()},
        tokens=logprob_BL.numel(),
        length=shape[1],
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip or 0.0,
        log_ratio_bound=log_ratio_bound,
    )
    with device.on(on):
        module.ratio_loss(loss=loss, stream=stream(on))
    return results["loss"], results["grad"], results["sums"], results["counts"]
