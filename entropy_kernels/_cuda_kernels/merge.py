"""Results of every row, from the partial sums of its vocabulary splits, by csrc/cuda/merge.cu.

T tokens, V vocabulary, S vocabulary splits.
"""

import torch
from torch import Tensor

from .._rows import ForwardRows
from .arguments import Given, check, check_temperature, stream
from .module import cuda


def merge(
    partials: Tensor,
    target_logit_T: Tensor,
    slot_T: Tensor,
    target_T: Tensor,
    temperature_T: Tensor | None,
    rows: ForwardRows,
    statistics: Tensor | None,
    vocabulary: int,
    ignore_index: int,
) -> None:
    """Fills `rows` and `statistics`: nats, zeros for ignored targets, NaN without an answer.

    partials: fp32 [4 or 7, S, T], as target_logit_T in the order of slots.
    slot_T: int32, where partials have each row; -1 for rows without a target.
    """
    _, splits, count = partials.shape
    fields = 4 if statistics is None else 7
    given: dict[str, Given] = {
        "partials": (partials, torch.float32, (fields, splits, count)),
        "target_logit": (target_logit_T, torch.float32, (count,)),
        "slot": (slot_T, torch.int32, (count,)),
        "target": (target_T, torch.int64, (count,)),
        "statistics": (statistics, torch.float32, (4, count)),
    }
    for name in rows._fields[:5]:
        given[name] = (getattr(rows, name), torch.float32, (count,))
    made = cuda().Merge(
        **check("merge", partials, given),
        **check_temperature("merge", temperature_T, partials, count),
        rows=count,
        vocabulary=vocabulary,
        splits=splits,
        ignore_index=ignore_index,
    )
    cuda().merge(merge=made, stream=stream(partials.device))
