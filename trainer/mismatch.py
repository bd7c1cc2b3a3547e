"""How far the engine that sampled and the policy that trains are apart, and what is done about it.

B sequences, L response width.
"""

from typing import Any

from torch import Tensor

from trainer.config import Config


def correction(settings: Config) -> dict[str, Any]:
    """Options of the loss that correct for pi_old / pi_sampler; none where that is not wanted.

    "auto" is none in fp32, where both give the same log-probs but for rounding, and "tis" in bf16.
    """
    algorithm, name = settings.algorithm, settings.algorithm.correction
    if name == "auto":
        dtypes = settings.model.compute_dtype or settings.model.dtype, settings.engine.dtype
        name = "tis" if "bfloat16" in dtypes else "none"
    if name == "none":
        return {}
    return {
        "correction": name,
        "correction_cap": algorithm.correction_cap,
        "correction_floor": algorithm.correction_floor,
    }


def mismatch_metrics(
    old_logprob_BL: Tensor, sampler_logprob_BL: Tensor, mask_BL: Tensor, settings: Config
) -> dict[str, float]:
    """Over the response tokens, with r = pi_old / pi_sampler of each.

    mismatch/kl is the mean of r - 1 - log r, an estimate of KL(sampler || old) that is never
    negative (k3, http://joschu.net/blog/kl-approx.html); mismatch/difference that of |log r|, and
    mismatch/corrected the share whose r the correction changes.
    """
    log_ratio = (old_logprob_BL - sampler_logprob_BL)[mask_BL].double()
    ratio, options = log_ratio.exp(), correction(settings)
    metrics = {
        "mismatch/kl": float((log_ratio.expm1() - log_ratio).mean()),
        "mismatch/max_ratio": float(ratio.max()),
        "mismatch/difference": float(log_ratio.abs().mean()),
    }
    if options:
        low, high = options["correction_floor"], options["correction_cap"]
        metrics["mismatch/corrected"] = float(((ratio < low) | (ratio > high)).double().mean())
    return metrics
