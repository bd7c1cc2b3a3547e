"""Group advantages and the overlong punishment.

B sequences.
"""

import torch
from torch import Tensor

from trainer.config import Algorithm


def group_advantages(reward_B: Tensor, group_B: Tensor, kind: str = "grpo") -> Tensor:
    """(R - mean) / (std + 1e-6) within each group; "dr_grpo" (arXiv 2503.20783) leaves the std out.

    The standard deviation is the unbiased one, and zero for a group of one. It is computed in fp64:
    in fp32 the rounding of a mean of equal rewards, divided by 1e-6, would be an advantage. Returns
    fp32.
    """
    reward_B = reward_B.double()
    _, index_B = group_B.unique(return_inverse=True)
    zero_G = reward_B.new_zeros(int(index_B.max()) + 1 if len(index_B) else 0)
    count_G = zero_G.index_add(0, index_B, torch.ones_like(reward_B))
    mean_G = zero_G.index_add(0, index_B, reward_B) / count_G
    centred_B = reward_B - mean_G[index_B]
    if kind == "dr_grpo":
        return centred_B.float()
    variance_G = zero_G.index_add(0, index_B, centred_B.square()) / (count_G - 1).clamp_min(1)
    return (centred_B / (variance_G.sqrt() + 1e-6)[index_B]).float()


def overlong_punishment(length_B: Tensor, limit: int, settings: Algorithm) -> Tensor:
    """0 up to `limit - overlong_cache` tokens, then linear down to -overlong_factor at the limit.

    DAPO, equation 13; added to the reward.
    """
    cache = settings.overlong_cache
    if cache == 0:
        return torch.zeros_like(length_B, dtype=torch.float32)
    over_B = (length_B - (limit - cache)).clamp(0, cache) / cache
    return -over_B * settings.overlong_factor
