"""Checks of `token_ids`: the ids whose log-probabilities are asked for, of all rows or per token.

T tokens, K ids.
"""

import torch
from torch import Tensor

from ._arguments import check_tensor
from .head import Head


def flat(token_ids: Tensor, head: Head) -> Tensor:
    """The ids of a head that was checked, int64: [K] of all rows, or [T, K].

    Raises:
        ValueError: another type, shape or device; names what came and what was wanted.
    """
    check_tensor("token_ids", token_ids)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids must be int64 or int32; got {token_ids.dtype}")
    if token_ids.device != head.hidden.device:
        raise ValueError(
            f"token_ids must be on {head.hidden.device}, like hidden; got {token_ids.device}"
        )
    shape, tokens = tuple(token_ids.shape), tuple(head.target.shape)
    if len(shape) != 1 and (len(shape) == 0 or shape[:-1] != tokens):
        wanted = ", ".join([*map(str, tokens), "K"])
        raise ValueError(f"token_ids must be [K], or [{wanted}] like target; got {shape}")
    flat_ids = token_ids if len(shape) == 1 else token_ids.flatten(0, -2)
    return flat_ids.long()


def check_values(ids: Tensor, head: Head) -> None:
    """Every flat id lies in [0, V); per token those of rows with a target.

    Raises:
        ValueError: names the id, its token and what was wanted.
    """
    vocabulary = head.weight.shape[0]
    wrong = (ids < 0) | (ids >= vocabulary)
    if ids.ndim > 1:
        wrong &= head.valid.unsqueeze(1)
    if wrong.any():
        where = f" at token {int(wrong.nonzero()[0, 0])}" if ids.ndim > 1 else ""
        raise ValueError(
            f"token_ids must lie in [0, {vocabulary}); got {int(ids[wrong][0])}{where}"
        )
