"""Whether oneDNN multiplies fp32 in bf16 here, as it may where the processor has tiles (AMX)."""

import functools

import torch

from entropy_kernels._bench.step import products_by_onednn


@functools.cache
def rounds_fp32() -> bool:
    """A product of two fp32 matrices by oneDNN is further off than fp32 can be."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator) for _ in range(2))
    with products_by_onednn():
        product = left @ right
    exact = left.double() @ right.double()
    return bool((product - exact).abs().max() > 1e-5 * exact.abs().max())
