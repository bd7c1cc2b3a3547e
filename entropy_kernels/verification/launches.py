"""The launchers of the head with a tile of the caller's choice.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._rows import ForwardRows
from ..head import Head

# Hidden states, weight, targets and bias.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def launch_forward(inputs: Inputs, tile: Any, options: dict[str, Any]) -> ForwardRows:
    """The forward by one tile; None stands for the table's."""
    from .._triton.head_forward.launch import forward

    return forward(
        make_head(inputs, options),
        keep_logits=options.get("keep_logits", False),
        store_above=options.get("store_above"),
        store_rows=options.get("store_rows", 0),
        statistics=options.get("statistics"),
        tile=tile,
        per_split=options.get("per_split"),
        chunk_rows=options.get("chunk_rows"),
    )


def launch_backward(
    gradients: Sequence[Tensor | None],
    inputs: Inputs,
    found: ForwardRows,
    tile: Any,
    options: dict[str, Any],
) -> list[Tensor]:
    """The backward of one tile; the gradients of hidden, weight and, where there is one, bias."""
    from .._triton.head_backward.launch import backward

    logprob, entropy, logsumexp = gradients
    got = backward(
        (logprob, entropy, logsumexp),
        make_head(inputs, options),
        found,
        (True, True, inputs[-1] is not None),
        max_active_rows=options.get("max_active_rows"),
        tile=tile,
        chunk_v=options.get("chunk_v"),
    )
    return [x for x in got if x is not None]


def make_head(inputs: Inputs, options: dict[str, Any]) -> Head:
    """The head in the form that backends take."""
    names = ("temperature", "softcap", "ignore_index")
    chosen = {name: options[name] for name in names if name in options}
    return Head(*inputs, **{"temperature": None} | chosen)
