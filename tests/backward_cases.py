"""Heads, incoming gradients and autograd for the tests of the compacted backward.

T tokens, D hidden, V vocabulary.
"""

import torch

from entropy_kernels import device
from tests import head_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
OPTIONS = {
    "bias": {"bias": True},
    "temperature": {"temperature": True},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "temperature": True, "softcap": 5.0},
}


def make(shape=(39, 16, 150), dtype=torch.float32, rows="peaked"):
    """Hidden states, weight and targets whose logits are of one kind; a few targets ignored."""
    h, w, y = head_cases.make(rows, shape, dtype, DEVICE)
    if shape[2] == 1:
        h = torch.ones_like(h)
    y[5::7] = IGNORE
    return h, w, y


def gradients_of(count: int, keep: float = 0.5):
    """Gradients of logprob, entropy and logsumexp, each at rows of its own."""
    return [(torch.randn(count) * (torch.rand(count) < keep)).to(DEVICE) for _ in range(3)]


def active(grads, y) -> int:
    """Rows with a gradient."""
    found = sum(g.isnan() | (g != 0) for g in grads) > 0
    return int((found & (y != IGNORE)).sum())


def active_numbers(grads, y):
    return ((sum(g != 0 for g in grads) > 0) & (y != IGNORE)).nonzero().squeeze(1)


def three_of(grads, h, w, y, b=None, **options):
    """The gradients of head_cases.three_of."""
    return [x[3:] for x in head_cases.three_of((h, w, y, b), grads, **options)]


def allowed(truths, h, w, **options):
    """What each gradient may err beyond both bounds."""
    arithmetic = head_cases.arithmetic_of(h, w, **options)
    return [0.0 if arithmetic is None else arithmetic.gradient(x) for x in truths]


def options_of(inputs, bias=False, temperature=False, softcap=None):
    _, w, y = inputs
    b = torch.randn(w.shape[0]).to(w) if bias else None
    temperature_T = torch.rand(len(y)).to(DEVICE) + 0.5 if temperature else None
    return {"b": b, "temperature": temperature_T, "softcap": softcap}


def tiles_here():
    """The tiles of the table that run on this device."""
    from entropy_kernels._triton.common import tiles

    some = torch.empty(16, 16, device=DEVICE)
    arch = device.architecture(some.device)
    keys = [key for key in tiles.TILES if (key.op, key.architecture) == ("dlogits", arch)]
    usable = tiles.variants(arch, some)
    return [tile for key in keys for tile in tiles.TILES[key] if tile.variant in usable]


class CountProducts:
    """Within, `products` is the sum of m n k over torch's products of backward, `calls` of them."""

    def __init__(self, monkeypatch, products):
        self.products, self.calls, self.batched = 0, 0, False
        for name in ("mm", "bmm"):
            monkeypatch.setattr(products, name, self._counting(getattr(products, name)))

    def _counting(self, function):
        def counting(left, right, out):
            self.products += left.numel() * right.shape[-1]
            self.calls += 1
            self.batched |= left.dim() == 3
            function(left, right, out)

        return counting

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass
