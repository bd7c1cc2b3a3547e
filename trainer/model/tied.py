"""One gradient for the weight of an embedding, which a head may share.

D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def one_gradient(model: Any) -> Iterator[None]:
    """Within it, the embedding's backward adds rows to the weight's gradient where that is.

    Otherwise each micro-batch makes another [V, D] of next to no rows, and adds it. The gradient is
    there from the start, with zeros; a head that shares the weight adds to it too. A weight that is
    sharded or frozen, and an embedding of another kind, stay as they are.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    fits = isinstance(embedding, nn.Embedding) and not isinstance(weight, DTensor)
    if not fits or not weight.requires_grad or embedding.sparse:
        yield
        return
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False
