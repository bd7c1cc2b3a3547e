"""One gradient for the weight of an embedding, which a head may share.

D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def one_gradient(model: Any) -> Iterator[None]:
    """Within it, the embedding's backward adds rows to the weight's gradient where that is.

    Otherwise each micro-batch makes another [V, D] of next to no rows, and adds it. The gradient is
    there from the start, with zeros; a head that shares the weight adds to it too. A weight that is
    sharded, frozen or has hooks, and an embedding of another kind, stay as they are.
    """
    embedding = model.get_input_embeddings()
    if not _fits(embedding):
        yield
        return
    weight = embedding.weight
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    forward = embedding.forward

    def in_place(*args: Any, **options: Any) -> Any:
        with _Lookups(weight):
            return forward(*args, **options)

    embedding.forward = in_place
    try:
        yield
    finally:
        del embedding.forward


def _fits(embedding: Any) -> bool:
    if not isinstance(embedding, nn.Embedding) or "forward" in vars(embedding):
        return False
    if embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None:
        return False
    weight: Any = embedding.weight
    # Hooks would be called without a gradient.
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return weight.requires_grad and not isinstance(weight, DTensor) and not hooks


class _Lookups(TorchFunctionMode):
    """Looks rows of `weight` up by _Rows, whatever the module then does to them."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding and len(args) > 1 and args[1] is self.weight:
            padding = args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx")
            return _Rows.apply(args[1], args[0], padding)
        return func(*args, **(kwargs or {}))


class _Rows(torch.autograd.Function):
    """Rows of a weight, whose gradients go where the weight's gradient is; padding has none."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return torch.embedding(weight, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        ctx.weight.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(ctx.weight.dtype))
        return None, None, None
