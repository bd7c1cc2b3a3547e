"""What the tests of the head share: heads of every kind, the sizes of its blocks, its truth.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

from entropy_kernels import reference
from entropy_kernels._torch import blocks
from entropy_kernels.testing import assert_within_two_bounds, peaked_head

BLOCK_T, BLOCK_V = blocks._SIZES["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = ["peaked", "uniform", "tied", "very negative", "large"]
# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
nan_is_meant = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def make(rows: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Hidden states, weight and targets whose logits are of one kind."""
    T, D, V = shape
    h, w, y = peaked_head(T, D, V)
    if rows == "uniform":
        h = torch.zeros_like(h)
    elif rows == "tied":
        w = w[: max(V // 2, 1)].repeat(3, 1)[:V]
    elif rows == "very negative":
        h[:, 0], w[:, 0] = 20.0, -20.0
    elif rows == "large":
        h = h / h.norm(dim=1, keepdim=True).clamp_min(1e-6) * 200
    return h.to(device, dtype), w.to(device, dtype), y.to(device)


def run(function, inputs, grads, **options):
    """Outputs and gradients (hidden, weight, bias) of a head."""
    h, w, y, b = inputs
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    b = None if b is None else b.detach().clone().requires_grad_()
    outputs = list(function(h, w, y, bias=b, **options)[:3])
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [o.detach() for o in outputs], [x.grad for x in (h, w, b) if x is not None]


def in_dtype(dtype):
    def function(h, w, y, bias=None, **options):
        bias = None if bias is None else bias.to(dtype)
        return reference.linear_logprob_entropy(
            h.to(dtype), w.to(dtype), y, bias, *_reference_options(**options)
        )

    return function


def _reference_options(temperature=1.0, softcap=None, ignore_index=-100):
    return temperature, softcap, ignore_index


def statistics_in(dtype, h, w, y, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100):
    b = None if bias is None else bias.to(dtype)
    return reference.head_statistics(
        h.to(dtype), w.to(dtype), y, b, temperature, softcap, ignore_index
    )


def _plain(truths, h, w, y, **options):
    """The formula in fp32 with the worst of a few orders of summation of the logits.

    A statistic is as far off as its logits are, and two words that tie in one order may not in
    another: of a max_prob of 1/2, a whole rounding of a logit. One-hot hidden states pick logits.
    """
    h, w = h.float(), w.float()
    orders = [slice(None), torch.randperm(h.shape[1]), torch.randperm(h.shape[1])]
    z = [h[:, order] @ w[:, order].T for order in orders]
    other_half = torch.arange(w.shape[0], device=w.device) % 2 == 0
    z += [z[1].where(other_half, z[0]), z[0].where(other_half, z[2])]
    eye = torch.eye(h.shape[0], device=h.device)
    found = [statistics_in(torch.float32, eye, x.T, y, **options) for x in z]
    return [
        max(got, key=lambda one, want=want: (one - want).abs().max())
        for got, want in zip(zip(*found, strict=True), truths, strict=True)
    ]


def check_statistics(got, h, w, y, *, factor=2.0, **options):
    """Both bounds for each statistic of `got`."""
    truths = statistics_in(torch.float64, h, w, y, **options)
    eager = statistics_in(h.dtype, h, w, y, **options) if h.dtype != torch.float32 else None
    worst = _plain(truths, h, w, y, **options)
    for one, *three in zip(got, truths, eager or worst, worst, strict=True):
        assert one.dtype == torch.float32
        assert_within_two_bounds(one, *three, factor=factor)
