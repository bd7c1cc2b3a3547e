"""Two-temperature decoding: equation 5 of "Beyond the 80/20 Rule" (arXiv 2506.01939).

B sequences, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


def temper(
    logits_BV: Tensor, threshold: Tensor | float, low: Tensor | float, high: Tensor | float
) -> Tensor:
    """Logits whose softmax is the distribution to sample from, fp32 [B, V].

    T = `high` for a row whose entropy, of softmax(logits) in nats, exceeds `threshold`, else `low`;
    temperature 0 leaves the greatest logit alone. The three are numbers, or one per row, [B].
    """
    logits_BV = logits_BV.float()
    logprob_BV = logits_BV.log_softmax(1)
    # 0 where a logit is -inf, which another processor may have put there.
    entropy_B = -(logprob_BV.exp() * logprob_BV.clamp_min(torch.finfo(torch.float32).min)).sum(1)
    at_B1 = torch.where(entropy_B > threshold, high, low).unsqueeze(1)
    divided_BV = logits_BV / at_B1.clamp_min(torch.finfo(torch.float32).tiny)
    greedy_BV = torch.full_like(logits_BV, -torch.inf)
    greedy_BV.scatter_(1, logits_BV.argmax(1, keepdim=True), 0.0)
    return torch.where(at_B1 == 0, greedy_BV, divided_BV)


class TwoTemperatures(LogitsProcessor):
    """A logits processor of transformers: `model.generate(..., do_sample=True,
    logits_processor=LogitsProcessorList([TwoTemperatures(0.672, low=1.0, high=2.0)]))`.

    `generate`'s own temperature is to be 1, and comes before it. Raises ValueError for a threshold
    or temperature that is negative or not finite.
    """

    def __init__(self, threshold: float, low: float, high: float):
        for name, value in (("threshold", threshold), ("low", low), ("high", high)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0; got {value}")
        self.threshold, self.low, self.high = float(threshold), float(low), float(high)

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Tempered `scores` [B, V]; `input_ids` are not looked at."""
        return temper(scores, self.threshold, self.low, self.high)

    def plain(self) -> dict[str, float]:
        """The three numbers, as a request to vLLM carries them."""
        return {"threshold": self.threshold, "low": self.low, "high": self.high}

    def __repr__(self) -> str:
        return f"TwoTemperatures({self.threshold}, low={self.low}, high={self.high})"
