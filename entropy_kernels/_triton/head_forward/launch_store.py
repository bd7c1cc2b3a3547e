"""The logits of rows of high entropy, copied for backward while forward has them at hand.

In each chunk of rows, those whose entropy reaches a threshold get the next places of a buffer, in
ascending order, until it is full. Backward reads active rows up to the first that has no place, and
recomputes the others. A row without a place costs a product, never its gradient. The counts stay on
the device, and are the same every time.

T tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .store_kernels import copy_rows_kernel, place_rows_kernel

BLOCK = 1024
# Columns that a program copies, and how many of them at once.
COPY_V = 16384
COPY_BLOCK_V = 4096


class LogitStore(NamedTuple):
    """Where forward stores logits.

    above: fp32 [], the least entropy of a row that is stored, in nats.
    logits: fp32 [places, V], as the product gives them, without the bias.
    places: int32 [T], the place of each row; -1 for those without.
    used: int32 [1], how many rows had that entropy so far.
    """

    above: Tensor
    logits: Tensor
    places: Tensor
    used: Tensor

    @classmethod
    def room(
        cls, above: Tensor | None, rows: int, count: int, vocabulary: int
    ) -> "LogitStore | None":
        """Room for `rows` of `count` rows; None without a threshold."""
        if above is None:
            return None
        on: dict[str, Any] = {"device": above.device}
        logits = torch.empty(rows, vocabulary, dtype=torch.float32, **on)
        places_T = torch.empty(count, dtype=torch.int32, **on)
        return cls(above, logits, places_T, torch.zeros(1, dtype=torch.int32, **on))

    def take(
        self, logits_TV: Tensor, start: int, entropy_T: Tensor, target_T: Tensor, ignore_index: int
    ) -> None:
        """Stores rows of a chunk, [rows, V], that begins at row `start`; the others are [T]."""
        (count, vocabulary), stop = logits_TV.shape, start + logits_TV.shape[0]
        places = self.places[start:stop]
        place_rows_kernel[(1,)](
            entropy_T[start:stop],
            target_T[start:stop],
            self.above,
            self.used,
            places,
            count,
            self.logits.shape[0],
            ignore_index,
            BLOCK=BLOCK,
            num_warps=4,
        )
        copy_rows_kernel[(count * triton.cdiv(vocabulary, COPY_V),)](
            logits_TV,
            places,
            self.logits,
            vocabulary,
            COLUMNS=COPY_V,
            BLOCK_V=COPY_BLOCK_V,
            num_warps=8,
        )
