"""The cases that decide whether a GPU's kernels of the products over given sets are right.

Pairs that must not be read have rows of NaN. Rows that must not be written keep what they held.

P pairs, D hidden.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .head_cases import Case

Dots = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
Sums = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], None]

# Lengths of runs in a row, as often as there is room. Chunks have 64 pairs, and a program merges 16
# of their parts at once: these begin and end inside of chunks, at their ends, and many chunks on.
RUNS = {
    "short": (1, 3, 1, 8, 9, 2, 17),
    "long": (63, 65, 1, 64, 64, 128, 7, 200),
    "one": (1 << 40,),
}
# D and P of each kind; fewer in the interpreter, which takes milliseconds per program. A first use
# has QUICK of them, and one way to sum each: it waits for each kernel to compile.
QUICK = 3
SIZES = (
    *(("short", 1040, 700), ("long", 1040, 1500), ("one", 1, 5000)),
    *(("long", 100, 1500), ("one", 64, 2400)),
)
SMALL = (
    *(("short", 528, 90), ("long", 528, 520), ("one", 1, 1400)),
    *(("long", 36, 520), ("one", 16, 1400)),
)
# fp32 sums of the largest chain: units of the last place of the sum of absolute values.
UNITS = 4


class Pairs(NamedTuple):
    """Places of a kind, ascending with gaps; scales, 0 where a pair is not live; and rows."""

    place: Tensor
    scale: Tensor
    i: Tensor
    rows: Tensor
    places: int


def support_cases(
    dtype: torch.dtype, device: torch.device, small: bool = False, quick: bool = False
) -> list[Case]:
    """Both products of rows of one dtype; of each kind, into it and into fp32."""
    sizes, name = SMALL if small else SIZES, str(dtype).removeprefix("torch.")
    found = [
        Case(f"support dots {name} D={D} P={P}", partial(check_dots, dtype, device, D, P))
        for _, D, P in sizes[: 1 if quick else None]
    ]
    for kind, D, P in sizes[: QUICK if quick else None]:
        alone = (torch.float32, True) if kind == "long" else (dtype, False)
        for out_dtype, add in itertools.product(
            dict.fromkeys((dtype, torch.float32)), (False, True)
        ):
            if not quick or (out_dtype, add) == alone:
                run = partial(check_sums, dtype, device, D, P, kind, out_dtype, add)
                more = f" into {str(out_dtype).removeprefix('torch.')}" + " added" * add
                found.append(Case(f"support sums {name} D={D} P={P} {kind}{more}", run))
    return found


def pairs(dtype: torch.dtype, device: torch.device, hidden: int, count: int, kind: str) -> Pairs:
    """Live are 80% of the pairs, but none of every tenth run, and none of the fourth chunk."""
    lengths = torch.tensor(RUNS[kind]).repeat(count).clamp_max(count)[: max(count, 1)]
    run_P = torch.arange(len(lengths)).repeat_interleave(lengths)[:count]
    places = 2 * len(lengths) + 1
    table = torch.randint(50, (50,))
    live_P = (torch.rand(count) < 0.8) & (run_P % 10 != 5) & (torch.arange(count) // 64 != 3)
    rows = torch.randn(51, hidden)
    rows[50] = torch.nan
    i_P = torch.where(live_P, table[torch.randint(50, (count,))], 50)
    scale_P = torch.where(live_P, torch.randn(count), 0.0)
    place_P, scale_P, i_P, rows = (
        x.to(device) for x in (2 * run_P + 1, scale_P, i_P, rows.to(dtype))
    )
    return Pairs(place_P, scale_P, i_P, rows, places)


def check_dots(
    dtype: torch.dtype,
    device: torch.device,
    hidden: int,
    count: int,
    by: Dots | None = None,
) -> None:
    """Pairs that are kept within fp32's error of fp64, the others 0; then all of them."""
    from .._triton.pair_products.launch import pair_dots

    by = by or pair_dots
    found = pairs(dtype, device, hidden, count, "short")
    left = torch.randn(found.places, hidden).to(dtype).to(device)
    left[0] = torch.nan
    keep_P = found.scale != 0
    place_P = torch.where(keep_P, found.place, 0)
    some, every = (found.rows, found.i, keep_P), (found.rows[:50], found.i % 50, None)
    for (right, j_P, kept), i_P in ((some, place_P), (every, found.place)):
        there = torch.ones_like(keep_P) if kept is None else kept
        got = by(left, right, i_P, j_P, kept)
        terms = left.double()[i_P] * right.double()[j_P]
        terms = torch.where(there[:, None], terms, 0.0)
        assert got.dtype == torch.float32
        _assert_near(got, terms.sum(1), terms.abs().sum(1), "dots")
        assert bool((got[~there] == 0).all()), "a pair that is not kept is not 0"


def check_sums(
    dtype: torch.dtype,
    device: torch.device,
    hidden: int,
    count: int,
    kind: str,
    out_dtype: torch.dtype,
    add: bool,
    by: Sums | None = None,
) -> None:
    """Sums within fp32's error of fp64, the same bits twice; what has no live pair stays."""
    from .._triton.pair_products.launch import pair_sums

    by = by or pair_sums
    found = pairs(dtype, device, hidden, count, kind)
    start = torch.randn(found.places, hidden).to(device).to(out_dtype)
    live_P = found.scale != 0
    terms = torch.where(
        live_P[:, None], found.scale.double()[:, None] * found.rows.double()[found.i], 0.0
    )
    truth = torch.zeros(found.places, hidden, dtype=torch.float64, device=device)
    size = truth.index_add(0, found.place, terms.abs())
    truth.index_add_(0, found.place, terms)
    written = torch.zeros(found.places, dtype=torch.bool, device=device)
    written[found.place[live_P]] = True
    if add:
        truth += start.double()
        size += start.double().abs()
    else:
        start[written] = torch.nan
    got, again = start.clone(), start.clone()
    for out in (got, again):
        by(found.scale, found.rows, found.i, found.place, out, add)
    assert torch.equal(got[~written], start[~written]), "a row without a live pair is written"
    _assert_near(got[written], truth[written], size[written], "sums")
    assert torch.equal(got[written], again[written]), "other bits in a second call"


def _assert_near(got: Tensor, truth: Tensor, size: Tensor, what: str) -> None:
    """Errors of fp32 sums of terms of that size, rounded once to got's dtype."""
    info = torch.finfo(got.dtype)
    bound = UNITS * torch.finfo(torch.float32).eps * size
    if got.dtype != torch.float32:
        # fp16 has subnormals.
        bound += info.eps / 2 * truth.abs() + info.smallest_normal * info.eps
    error = (got.double() - truth).abs()
    bad = ~(error <= bound)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {float(got[tuple(at)])} at {at} where fp64 has {float(truth[tuple(at)])}: "
            f"the error exceeds {float(bound[tuple(at)]):.1e}; {int(bad.sum())} of {bad.numel()} do"
        )
