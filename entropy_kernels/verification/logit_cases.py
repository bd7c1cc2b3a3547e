"""The cases that decide whether a GPU's entropies of a sampler's logits are right.

R rows, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .head_cases import Case

Entropies = Callable[..., Tensor]

# R, V, and the blocks of 2,048 columns of a program; None leaves them to the sizes. A first use has
# the first of them, each with one of TEMPERATURES: it waits for each kernel to compile.
SHAPES = ((9, 6157, 2), (9, 6160, None), (9, 50, None), (9, 6157, 4), (1, 1, None))
TEMPERATURES = ("one per row", "none", "one")
# An entropy errs by this much of itself: five roundings of a distance of 75 in units of log2.
RELATIVE = 4e-5


def entropy_cases(dtype: torch.dtype, device: torch.device, quick: bool = False) -> list[Case]:
    """Entropies from log V down to 1e-25, with temperatures and without."""
    name = str(dtype).removeprefix("torch.")
    pairs = [*itertools.product(SHAPES, TEMPERATURES)]
    if quick:
        pairs = [*zip(SHAPES, TEMPERATURES, strict=False)]
    return [
        Case(
            f"entropy_from_logits {name} R={R} V={V} blocks={tiles} temperatures: {kind}",
            partial(check_entropies, dtype, device, (R, V), tiles, kind),
        )
        for (R, V, tiles), kind in pairs
    ]


def logits_of(rows: int, vocabulary: int) -> Tensor:
    """fp32 logits of every kind, one after the other, down each column as often as there is room.

    The kinds: flat, equal, two ties, a peak of 20, one of 55, and -inf but for one or for 40. The
    last two have no entropy: -inf throughout, and a NaN.
    """
    z_RV = torch.randn(rows, vocabulary)
    kind = torch.arange(rows) % 9
    peak = torch.randint(vocabulary, (rows,))
    z_RV[kind == 1] = -3.25
    for number, height in ((2, 30.0), (3, 20.0), (4, 55.0)):
        z_RV[kind == number, peak[kind == number]] = height
    z_RV[kind == 2, 0] = 30.0
    for number, left in ((5, 1), (6, 40), (7, 0)):
        z_RV[kind == number, left:] = -math.inf
    z_RV[kind == 8, peak[kind == 8]] = math.nan
    return z_RV


def entropy_in_fp64(z_RV: Tensor, temperature: Tensor | None) -> Tensor:
    """log s - E[z - max] with the maximum's own 1 left out of s: small entropies keep digits."""
    z_RV = z_RV.double()
    if temperature is not None:
        z_RV = z_RV / temperature.double().reshape(-1, 1)
    top, at = z_RV.max(1, keepdim=True)
    d_RV = z_RV - top
    e_RV = d_RV.exp()
    rest = e_RV.scatter(1, at, 0.0).sum(1)
    far = torch.where(e_RV == 0, 0.0, e_RV * d_RV).sum(1)
    return rest.log1p() - far / (1 + rest)


def check_entropies(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int],
    tiles: int | None,
    kind: str,
    by: Entropies | None = None,
) -> None:
    """Relative to each entropy; NaN where a row has none, and where its temperature is not one."""
    from .._triton.sampling.launch import entropy_from_logits

    by = by or entropy_from_logits
    rows, vocabulary = shape
    # Rows of a wider matrix, as engines pad them.
    z_RV = logits_of(rows, vocabulary).to(dtype).to(device)
    wide = torch.nn.functional.pad(z_RV, (0, 16 + -vocabulary % 16), value=math.nan)
    temperature = None
    if kind != "none":
        temperature = (torch.rand(1 if kind == "one" else rows) + 0.5).to(device)
    got = by(wide[:, :vocabulary], temperature, tiles)
    truth = entropy_in_fp64(z_RV, temperature)
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), truth.isnan()), "another row than those without one is NaN"
    _assert_near(got[~truth.isnan()], truth[~truth.isnan()])
    if temperature is not None:
        temperature[0] = 0.0
        got = by(wide[:, :vocabulary], temperature, tiles)
        assert got[0].isnan(), "a temperature of 0 gives an entropy"


def _assert_near(got: Tensor, truth: Tensor) -> None:
    error = (got.double() - truth).abs()
    # What is below the smallest normal fp32 is nothing to a probability.
    bad = ~(error <= RELATIVE * truth + 1e-30)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise AssertionError(
            f"entropies: {float(got[at])} of row {at} where fp64 has {float(truth[at])}: the error "
            f"exceeds {RELATIVE:.0e} of it; {int(bad.sum())} of {bad.numel()} do"
        )
