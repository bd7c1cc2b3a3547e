"""The cases that decide whether a GPU's kernels of the ratio loss and the selection are right.

As those of the head in kernel_cases.py, pytest and `python -m benchmarks.gpu` run them.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.gpu.ours import selected_by
from entropy_kernels import reference
from entropy_kernels._bounds import assert_within_two_bounds
from tests.kernel_cases import Case
from tests.loss_cases import worst_of_shuffles

RATIO_SHAPES = [(1, 1), (1, 64), (1, 65), (1, 700), (3, 7), (65, 1), (2, 130)]
KINDS = ["distinct", "tied", "equal", "zeros", "negative", "broken"]


def ratio_loss_cases(impl: str, device: torch.device, small: bool = False) -> list[Case]:
    """The loss, its gradient and its metrics within two bounds of fp64."""
    return [
        Case(
            f"ratio_loss {impl} {shape} {loss_type} dual_clip={dual_clip}",
            partial(_ratio_loss, impl, device, shape, loss_type, dual_clip),
        )
        for shape in (RATIO_SHAPES if small else [*RATIO_SHAPES, (64, 8191)])
        for loss_type in ("dapo", "grpo")
        for dual_clip in (None, 2.0)
    ]


def selection_cases(impl: str, device: torch.device, small: bool = False) -> list[Case]:
    """The threshold and the mask of exactly k are those of a stable sort, to the bit."""
    return [
        Case(f"selection {impl} {kind} N={count}", partial(_selection, impl, device, count, kind))
        for count in ((0, 1, 128, 600) if small else (0, 1, 1000, 100_003, 3_000_017))
        for kind in KINDS
    ]


def ratio_batch(shape: tuple[int, int], device: torch.device | str) -> list[Tensor]:
    """Ratios on both sides of every clip, both signs and zero advantages, a mask and a subset."""
    logprob = -torch.rand(shape) * 3 - 5
    old = logprob + torch.randn(shape) * 10 ** (2 * torch.rand(shape) - 2)
    advantage = torch.randn(shape) * (torch.rand(shape) < 0.9)
    mask, selected = torch.rand(shape) < 0.8, torch.rand(shape) < 0.7
    return [x.to(device) for x in (logprob, old, advantage, mask, selected)]


def loss_and_gradient(op: Any, logprob: Tensor, *rest: Tensor, **options: Any) -> Any:
    """Loss, its gradient and the metrics."""
    x = logprob.detach().clone().requires_grad_()
    loss, metrics = op(x, *rest, **options)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad, metrics


def _ratio_loss(
    impl: str,
    device: torch.device,
    shape: tuple[int, int],
    loss_type: str,
    dual_clip: float | None,
) -> None:
    *values, mask, selected = ratio_batch(shape, device)
    options = {"selected": selected, "loss_type": loss_type, "dual_clip": dual_clip}
    got = loss_and_gradient(partial(ek.ratio_loss, impl=impl), *values, mask, **options)
    in_torch = partial(ek.ratio_loss, impl="torch")
    plain = loss_and_gradient(in_torch, *values, mask, **options)
    truth = loss_and_gradient(in_torch, *(x.double() for x in values), mask, **options)

    def loss(x: Tensor, *rest: Tensor) -> Tensor:
        return in_torch(x, *rest[:-1], **(options | {"selected": rest[-1]}))[0]

    worst = worst_of_shuffles(loss, values[0], (*values[1:], mask, selected), truth[:2])
    for g, t, p in zip(got[:2], truth[:2], worst, strict=True):
        assert_within_two_bounds(g, t, p, p)
    for name in ("ratio/mean", "ratio/max", "kl/k1", "kl/k3"):
        g, t, p = (metrics[name] for _, _, metrics in (got, truth, plain))
        assert_within_two_bounds(g, t, p, p)
    for name in ("clip/low", "clip/high", "head/active_rows", "tokens/all", "tokens/selected"):
        assert torch.equal(got[2][name], plain[2][name]), name
    assert torch.equal(got[1] == 0, plain[1] == 0)


def values_of(kind: str, count: int, device: torch.device | str) -> Tensor:
    """Entropies of one kind."""
    values = torch.empty(count).exponential_(generator=torch.Generator().manual_seed(count))
    if kind == "tied":
        values = (3 * values).floor()
    elif kind == "equal":
        values.fill_(0.6931)
    elif kind == "zeros":
        values = torch.where(values < 0.5, 0.0, -0.0)
    elif kind == "negative":
        values = values.log()
    elif kind == "broken":
        values = torch.where(values < 0.1, -math.nan, torch.where(values > 2, math.inf, values))
    return values.to(device)


def masks_of(count: int, device: torch.device | str) -> list[Tensor | None]:
    """No mask, one of 70% of the tokens, and an empty one."""
    some = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.7
    return [None, some.to(device), torch.zeros(count, dtype=torch.bool, device=device)]


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_as_the_sort(impl: str, values: Tensor, mask: Tensor | None, fraction: float) -> None:
    threshold, selected = selected_by(impl, values, mask, fraction)
    values, mask = values.cpu(), None if mask is None else mask.cpu()
    assert_same_bits(threshold.cpu(), reference.entropy_threshold(values, mask, fraction))
    assert torch.equal(selected.cpu(), reference.top_entropy_mask(values, mask, fraction))


def _selection(impl: str, device: torch.device, count: int, kind: str) -> None:
    for mask in masks_of(count, device):
        assert_as_the_sort(impl, values_of(kind, count, device), mask, 0.2)
