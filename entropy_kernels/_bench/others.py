"""Heads that others have: torch.nn.functional.linear_cross_entropy, and that of TRL's kernels.

A head maps hidden states, weight and targets to log-probabilities and entropies. Entropies are None
where it has none.

T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .contestant import RefusedError

# Rows of a chunk of torch's head on a CPU, faster there than what it chooses itself.
CHUNK = 512
# The vocabulary of a block of TRL 1.16: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, whose module
# imports a whole trainer.
TRL_CHUNK = 32768


def torch_head(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, chunked: bool = False
) -> tuple[Tensor, None]:
    """torch's linear_cross_entropy per token, which a loss of ratios needs.

    It computes gradients in forward for a sum or a mean alone, whose weights it would need before
    it has the log-probabilities. Without chunks it holds all logits; that is its fastest setting on
    a CPU. In chunks it sums in the inputs' dtype; in fp32, its default, it multiplies fp32 copies
    of what has 16 bits.

    Raises:
        RefusedError: before torch 2.13.
    """
    if why := why_no_torch_head():
        raise RefusedError(why)
    options = None
    if chunked:
        options = nn.LinearCrossEntropyOptions()
        if hidden_TD.device.type == "cpu":
            options = nn.LinearCrossEntropyOptions(
                batch_chunk_size=CHUNK, acc_policy="balanced", acc_dtype=hidden_TD.dtype
            )
    nll_T = functional.linear_cross_entropy(
        hidden_TD, weight_VD, target_T, reduction="none", options=options
    )
    return -nll_T, None


def why_no_torch_head() -> str:
    """Why this torch has no linear_cross_entropy in chunks; empty where it has."""
    if hasattr(functional, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        return ""
    return f"needs torch 2.13 or newer; this is torch {torch.__version__}"


def trl_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """trl.kernels.ChunkedLogProbFunction of TRL 1.16.

    Raises:
        RefusedError: where TRL has no such kernels.
    """
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        raise RefusedError("needs TRL 1.16 or newer") from None
    found = ChunkedLogProbFunction.apply(
        hidden_TD, weight_VD, None, target_T, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return found[0], found[1]
