"""The cases that decide whether a GPU's kernels of the ratio loss and the selection are right.

As those of the head in head_cases.py, pytest and `python -m benchmarks.gpu` run them.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._bounds import assert_within_two_bounds
from .._cuda_kernels import ratio_loss as cuda_ratio_loss
from .._cuda_kernels import selection as cuda_selection
from .._torch import ratio_loss as torch_ratio_loss
from .._torch import selection as torch_selection
from .head_cases import Case
from .truth import worst_of_shuffles

# Lower and upper clip, the largest log of a ratio: some tokens' are beyond each.
CLIPS = (0.2, 0.28)
LOG_RATIO_BOUND = 1.5
RATIO_SHAPES = [(1, 1), (1, 64), (1, 65), (1, 700), (3, 7), (65, 1), (2, 130)]
KINDS = ["distinct", "tied", "equal", "zeros", "negative", "broken"]


def ratio_loss_cases(impl: str, device: torch.device, small: bool = False) -> list[Case]:
    """The loss, its gradient and its metrics within two bounds of fp64."""
    return [
        Case(
            f"ratio_loss {impl} {shape} per_sequence={per_sequence} dual_clip={dual_clip}",
            partial(_ratio_loss, impl, device, shape, per_sequence, dual_clip),
        )
        for shape in (RATIO_SHAPES if small else [*RATIO_SHAPES, (64, 8191)])
        for per_sequence in (False, True)
        for dual_clip in (None, 2.0)
    ]


def selection_cases(impl: str, device: torch.device, small: bool = False) -> list[Case]:
    """The threshold and the mask of exactly k are those of a stable sort, to the bit."""
    return [
        Case(f"selection {impl} {kind} N={count}", partial(_selection, impl, device, count, kind))
        for count in ((0, 1, 128, 2100) if small else (0, 1, 1000, 100_003, 3_000_017))
        for kind in KINDS
    ]


def ratio_batch(shape: tuple[int, int], device: torch.device | str) -> list[Tensor]:
    """Ratios on both sides of every clip, both signs and zero advantages, a mask and a subset."""
    logprob = -torch.rand(shape) * 3 - 5
    old = logprob + torch.randn(shape) * 10 ** (2 * torch.rand(shape) - 2)
    advantage = torch.randn(shape) * (torch.rand(shape) < 0.9)
    mask, selected = torch.rand(shape) < 0.8, torch.rand(shape) < 0.7
    return [x.to(device) for x in (logprob, old, advantage, mask, selected)]


def _ratio_loss(
    impl: str,
    device: torch.device,
    shape: tuple[int, int],
    per_sequence: bool,
    dual_clip: float | None,
) -> None:
    *values, mask, selected = ratio_batch(shape, device)
    selected &= mask
    counts_B = selected.sum(1) if per_sequence else selected.sum().reshape(1)
    weight_B = counts_B.clamp_min(1).reciprocal() / len(counts_B)
    if not per_sequence:
        *values, selected = (x.reshape(1, -1) for x in (*values, selected))
    clips: Any = (*CLIPS, dual_clip, LOG_RATIO_BOUND)
    in_torch: Any = torch_ratio_loss.ratio_loss
    truth = in_torch(*(x.double() for x in values), selected, weight_B.double(), *clips)
    plain = in_torch(*values, selected, weight_B, *clips)
    got = _ratio_loss_by(impl)(*values, selected, weight_B, *clips)

    def both(x: Tensor, old: Tensor, advantage: Tensor, selected: Tensor, weight: Tensor) -> Any:
        return in_torch(x, old, advantage, selected, weight[:, 0], *clips)[:2]

    others = (*values[1:], selected, weight_B[:, None].expand_as(selected))
    worst = worst_of_shuffles(both, values[0], others, truth[:2])
    for g, t, p in zip(got[:2], truth[:2], worst, strict=True):
        assert_within_two_bounds(g, t, p, p)
    for g, t, p in zip(got[2], truth[2], plain[2], strict=True):
        assert_within_two_bounds(g, t, p, p)
    assert torch.equal(got[3], plain[3]), "clipped tokens, or those with a gradient"
    assert torch.equal(got[1] == 0, plain[1] == 0)
    values[0].masked_fill_(selected & (selected.cumsum(1) == 1), math.nan)
    got, plain = (f(*values, selected, weight_B, *clips) for f in (_ratio_loss_by(impl), in_torch))
    for g, p in zip((*got[:2], got[2]), (*plain[:2], plain[2]), strict=True):
        assert torch.equal(g.isnan(), p.isnan()), "a NaN is dropped, or spreads"


def _ratio_loss_by(impl: str) -> Any:
    if impl == "torch":
        return torch_ratio_loss.ratio_loss
    if impl == "cuda":
        return cuda_ratio_loss.ratio_loss
    from .._triton.ratio_loss.launch import ratio_loss

    return ratio_loss


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


def _selection_by(impl: str) -> Any:
    """A module with `radix_histogram`, `radix_pick` and `select_largest`."""
    if impl == "torch":
        return torch_selection
    if impl == "cuda":
        return cuda_selection
    from .._triton.selection import launch

    return launch


def select(
    impl: str, values: Tensor, mask: Tensor | None, fraction: float
) -> tuple[Tensor, Tensor]:
    """The threshold and the mask of exactly k values, by one backend's kernels."""
    by, share = _selection_by(impl), torch_selection.exact_share(fraction)
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    remaining, threshold, known = None, prefix, 0
    for shift, bits in torch_selection.PASSES:
        counts = by.radix_histogram(values, mask, prefix, shift, bits, known)
        prefix, remaining, _, threshold = by.radix_pick(
            counts, counts, prefix, remaining, share, shift
        )
        known += bits
    return threshold, by.select_largest(values, mask, threshold, remaining)


def assert_as_the_sort(impl: str, values: Tensor, mask: Tensor | None, fraction: float) -> None:
    threshold, selected = select(impl, values, mask, fraction)
    values, mask = values.cpu(), None if mask is None else mask.cpu()
    assert_same_bits(threshold.cpu(), reference.entropy_threshold(values, mask, fraction))
    wanted = reference.top_entropy_mask(values, mask, fraction)
    assert torch.equal(selected.cpu(), wanted), "another selection than a stable sort's"


def _assert_as_digits(values: Tensor, mask: Tensor | None, fraction: float) -> None:
    """The one launch of csrc/cuda that makes a whole selection of few values."""
    share = torch_selection.exact_share(fraction)
    threshold, *_, selected = cuda_selection.top(values, mask, share, True)
    want, wanted = select("cuda", values, mask, fraction)
    assert_same_bits(threshold, want)
    assert torch.equal(selected, wanted), "another selection in one launch than digit by digit"


def _selection(impl: str, device: torch.device, count: int, kind: str) -> None:
    for mask in masks_of(count, device):
        values = values_of(kind, count, device)
        assert_as_the_sort(impl, values, mask, 0.2)
        if impl == "cuda" and count <= cuda_selection.most_of_one_block():
            _assert_as_digits(values, mask, 0.2)
