"""What the tests of the head share: heads of every kind, and the sizes of its blocks.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

from entropy_kernels._torch import blocks
from entropy_kernels.testing import peaked_head

BLOCK_T, BLOCK_V = blocks._SIZES["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = ["peaked", "uniform", "tied", "very negative", "large"]
# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
nan_is_meant = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def make(rows: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Hidden states, weight and targets whose logits are of one kind."""
    T, D, V = shape
    h, w, y = peaked_head(T, D, V)
    if rows == "uniform":
        h = torch.zeros_like(h)
    elif rows == "tied":
        w = w[: max(V // 2, 1)].repeat(3, 1)[:V]
    elif rows == "very negative":
        h[:, 0], w[:, 0] = 20.0, -20.0
    elif rows == "large":
        h = h / h.norm(dim=1, keepdim=True).clamp_min(1e-6) * 200
    return h.to(device, dtype), w.to(device, dtype), y.to(device)
