"""Heads that are asked about where the interpreter stands for a GPU.

T tokens, D hidden, V vocabulary.
"""

import torch

import entropy_kernels as ek
from entropy_kernels import backends
from entropy_kernels.verification.question import call_of

CPU = torch.device("cpu")
T, D, V = 40, 48, 208


def make_head(dtype=torch.float32, gradient=True, **options):
    torch.manual_seed(3)
    h, w = torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)
    return ek.Head(
        h.requires_grad_(gradient), w.requires_grad_(gradient), torch.randint(V, (T,)), **options
    )


def taken(head, **options):
    """The backend that "auto" takes."""
    return backends.resolve_head("auto", head.flat(), **options)


def call(head):
    return call_of(head.flat(), keep_logits=False, stored=False, statistics=False)
