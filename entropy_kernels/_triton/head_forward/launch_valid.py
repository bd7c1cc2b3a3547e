"""The rows that have a target, brought together, so that ignored rows have no part in a product.

Their number stays on the device: launches have programs for all rows, and those beyond the number
end at once. A call allocates T (D E + 4 (6 or 7)) bytes, with E bytes per element of the inputs.

T tokens, D hidden.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...head import Head
from ..head_backward.launch_rows import ActiveRows, active_rows
from .valid_rows_kernel import valid_rows_kernel

# Rows that a program copies, and columns of them at once.
COPY_ROWS = 4
MAX_COPY_D = 512
# Zero rows after them, at least as many as a tile has.
PADDING = 256


class ValidRows(NamedTuple):
    """What a forward multiplies, [T] or [T, D]; the rest is undefined.

    temperature: fp32, expanded where all rows share one; None stands for 1.
    numbered: where these rows come from.
    """

    hidden: Tensor
    target: Tensor
    temperature: Tensor | None
    numbered: ActiveRows


def valid_rows(head: Head, target_T: Tensor) -> ValidRows:
    """The rows of `target_T`, contiguous, whose target is not ignored."""
    (count, hidden), temperature_T = head.hidden.shape, head.temperature_T
    numbered = active_rows(None, target_T, head.ignore_index, count)
    copies = temperature_T is not None and temperature_T.stride(0) != 0
    valid = ValidRows(
        head.hidden.new_empty(count, hidden),
        torch.empty_like(target_T),
        temperature_T.new_empty(count) if copies and temperature_T is not None else temperature_T,
        numbered,
    )
    valid_rows_kernel[(triton.cdiv(count, COPY_ROWS),)](
        head.hidden,
        target_T,
        temperature_T,
        numbered.rows,
        numbered.number,
        valid.hidden,
        valid.target,
        valid.temperature,
        *head.hidden.stride(),
        0 if temperature_T is None else temperature_T.stride(0),
        count,
        hidden,
        HAS_TEMPERATURES=copies,
        PADDING=PADDING,
        BLOCK_T=COPY_ROWS,
        BLOCK_D=min(MAX_COPY_D, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return valid
