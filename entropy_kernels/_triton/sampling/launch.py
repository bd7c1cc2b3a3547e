"""Entropies of the distributions that a sampler draws from, out of its logits.

R rows, V vocabulary, S vocabulary splits.
"""

import torch
import triton
from torch import Tensor

from ... import device
from .kernels import logit_entropy_kernel, logit_sums_kernel

BLOCK_V = 2048
# Programs that a multiprocessor can hold, twice: fewer rows are divided into more splits.
PROGRAMS_PER_PROCESSOR = 32
# Rows and splits of one step of a program that merges.
MERGE_BLOCK = (4, 32)


def entropy_from_logits(
    logits_RV: Tensor, temperature: Tensor | None, tiles: int | None = None
) -> Tensor:
    """The entropy of softmax(logits / temperature) of each row, fp32 [R], in nats.

    Two launches. The first reads the logits once: 4 V bytes per row of fp32, 2 V of 16 bits; no
    copy is made. Few rows are divided among many programs, each of which leaves 16 bytes that the
    second launch reads. So a row moves 4 V + 32 S + 8 bytes, with one split for each 2,048 columns
    at most: 32 S is at most 0.4% of 4 V. Beside its result it allocates 16 R S bytes.

    Rows with entries of -inf have their entropy over the others. NaN for a row of -inf throughout,
    for one with a NaN or +inf, and where the temperature is not positive and finite.

    logits_RV: fp32, bf16 or fp16, with stride 1 along V.
    temperature: fp32 [R] or [1]; None for 1.
    tiles: blocks of columns of one program, where a caller does not leave it to the sizes.
    """
    (rows, vocabulary), on = logits_RV.shape, logits_RV.device
    assert vocabulary > 0
    assert logits_RV.stride(1) == 1 or vocabulary == 1
    entropy_R = torch.empty(rows, dtype=torch.float32, device=on)
    if rows == 0:
        return entropy_R
    blocks = triton.cdiv(vocabulary, BLOCK_V)
    most = PROGRAMS_PER_PROCESSOR * device.processors(on)
    tiles = tiles or max(1, min(blocks, rows * blocks // most))
    n_split = triton.cdiv(blocks, tiles)
    partials = torch.empty(4, n_split, rows, dtype=torch.float32, device=on)
    of_rows = 0 if temperature is None or temperature.numel() == 1 else temperature.stride(0)
    block_r, block_s = MERGE_BLOCK
    with device.on(on):
        logit_sums_kernel[(rows * n_split,)](
            logits_RV,
            temperature,
            partials,
            logits_RV.stride(0),
            of_rows,
            rows,
            vocabulary,
            n_split,
            tiles,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK_V=BLOCK_V,
            num_warps=4,
            enable_fp_fusion=True,
        )
        logit_entropy_kernel[(triton.cdiv(rows, block_r),)](
            partials,
            temperature,
            entropy_R,
            of_rows,
            rows,
            n_split,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK_R=block_r,
            BLOCK_S=block_s,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return entropy_R
