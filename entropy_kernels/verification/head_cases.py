"""The cases that decide whether a GPU's kernels of the head are right, against fp64.

pytest runs them on a GPU or, at small sizes, in Triton's interpreter; `python -m benchmarks.gpu`
runs them on a GPU without pytest.

T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import STATISTICS
from . import truth
from .head_runs import (
    ORDERS,
    Shape,
    Tiles,
    arithmetic_of,
    check,
    check_logits,
    close,
    fitting,
    forward,
    make_gradients,
    make_inputs,
    of_head,
    ours,
    references_of,
)
from .launches import launch_backward
from .truth import ROWS

SHAPES = {
    "one": (1, 1, 1),
    "two words": (3, 1, 2),
    "prime": (31, 37, 1021),
    "a tile": (128, 64, 256),
    "one more": (129, 72, 257),
    "deep": (130, 1096, 4099),
    "V=50257": (257, 136, 50257),
    "V=151936": (300, 1024, 151936),
}
SMALL_SHAPES = {
    "one": (1, 1, 1),
    "two words": (3, 1, 2),
    "prime": (31, 37, 97),
    "a tile": (32, 32, 64),
    "one more": (33, 36, 65),
    "one split and one word": (5, 8, 129),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "bias": ("bias",),
    "one temperature": ("temperature",),
    "a temperature per token": ("temperatures",),
    "softcap": ("softcap",),
    "ignored rows": ("ignore",),
    "strided": ("strided",),
    "all options": ("bias", "temperatures", "softcap", "ignore", "strided"),
    "all options, logits stored": ("bias", "temperatures", "softcap", "ignore", "keep"),
}


class Case(NamedTuple):
    """A name, a call that raises AssertionError where a result is wrong, and the bytes it needs."""

    name: str
    run: Callable[[], None]
    bytes: int = 0


def head_cases(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, small: bool = False
) -> list[Case]:
    """The cases of a forward and a dlogits tile in one dtype; every one draws new numbers."""
    shape = (33, 24, 201) if small else (200, 128, 5003)
    shapes = SMALL_SHAPES if small else SHAPES
    found: list[tuple[Any, ...]] = [
        *((f"shape: {name}", compare, x) for name, x in shapes.items()),
        *((f"rows: {rows}", compare, shape, rows) for rows in ROWS),
        *((f"options: {name}", compare, shape, "peaked", x) for name, x in OPTIONS.items()),
        ("rows without an answer", no_answer, shape, ("bias", "temperatures")),
        ("a masked vocabulary", masked, shape),
        ("statistics", compare, shape, "peaked", ("temperatures", "ignore", "statistics"), False),
        ("the first of equals", first_of_equals, shape, ("temperatures", "ignore", "statistics")),
        ("same bits twice", twice, shape),
    ]
    if tiles[0] is None or tiles[0].variant == "cublas":
        found += [
            ("stored rows", stored_rows, shape, False),
            ("stored rows, bounded", stored_rows, shape, True),
        ]
    return [Case(name, partial(run, tiles, dtype, device, *rest)) for name, run, *rest in found]


def compare(
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    rows: str = "peaked",
    names: tuple[str, ...] = (),
    backward: bool = True,
    **launch: Any,
) -> None:
    """Outputs within both bounds, with statistics, stored logits and gradients where asked for.

    launch: further options of the launches, and `orders` of truth.three_of.
    """
    inputs, options = make_inputs(shape, dtype, device, rows, names)
    options |= launch
    _, _, y, bias = inputs
    if "edges" in names:
        # The first and the last word, of the vocabulary and of a split; no ignored row.
        split = launch["chunk_v"]
        y[[1, 2, 4, 5]] = torch.tensor([0, shape[2] - 1, split - 1, split], device=device)
    if bias is not None:
        forbidden = torch.arange(shape[2], device=device) % 16 == 5
        bias[forbidden.index_fill(0, y.clamp_min(0), False)] = -math.inf
    gradients = make_gradients(shape[0], device, names) if backward else None
    found, got = ours(tiles, inputs, gradients, options)
    check(got, references_of(inputs, gradients, options), inputs, options)
    if found.logits.numel():
        check_logits(found, inputs, inputs[2] != options.get("ignore_index", -100))
    if "ignore" in names:
        assert not any(x[::3].any() for x in got[:4]), "an ignored row is not zero"
    if "statistics" in names:
        orders = 2 * options.get("orders", ORDERS)
        three = truth.three_statistics(
            *inputs[:3], bias=inputs[3], orders=orders, **of_head(options)
        )
        # A largest p of 1/2 is off by a whole rounding of a logit.
        arithmetic = arithmetic_of(inputs, options)
        truth.check_statistics(options["statistics"], three, arithmetic, factor=3.0)
        if len(options["statistics"]) == len(STATISTICS):
            truth.check_is_top1(
                options["statistics"][5], *inputs[:3], bias=inputs[3], **of_head(options)
            )


def no_answer(
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    names: tuple[str, ...] = (),
    **launch: Any,
) -> None:
    """NaN and infinities, targets outside [0, V) and temperatures that are not positive make NaN
    of their rows, and of theirs alone. An ignored row among them is 0. No logit at all is NaN.
    """
    (h, w, y, bias), options = make_inputs(shape, dtype, device, "peaked", names)
    h[3, 0], h[5, 1], h[6, 2], y[7], y[9] = math.nan, math.inf, -math.inf, shape[2], -1
    h[8, 0], y[8] = math.nan, -100
    # A softcap bounds infinities, too.
    broken = [3, 7, 9] if "softcap" in names else [3, 5, 6, 7, 9]
    if "temperatures" in names:
        options["temperature"][[11, 14]] = torch.tensor([0.0, -1.0], device=device)
        broken += [11, 14]
    wrong = torch.zeros(shape[0], dtype=torch.bool, device=device)
    wrong[broken] = True
    options |= launch
    found = forward(tiles, (h, w, y, bias), options)
    named = dict(zip(found._fields[:5], found[:5], strict=True))
    for name, x in [*named.items(), *zip(STATISTICS, options.get("statistics", ()), strict=False)]:
        assert torch.equal(x.isnan(), wrong), f"{name}: rows {x.isnan().nonzero().flatten()}"
        assert x[8] == 0, name
    if bias is not None and "softcap" not in names:
        nothing = torch.full_like(bias, -math.inf)
        for x in forward(tiles, (h, w, y, nothing), options)[:3]:
            assert x.isnan().sum() == len(x) - 1, "a row without a logit has an answer"


def first_of_equals(
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    names: tuple[str, ...] = (),
    **launch: Any,
) -> None:
    """is_top1 among logits that tie: those of small integers, which are exact.

    Every row of the weight comes several times, and hidden states of zero make all logits equal.
    """
    (h, w, y, bias), options = make_inputs(shape, dtype, device, "peaked", names)
    (T, _, V), few = shape, max(shape[2] // 5, 1)
    if "softcap" in options:
        options["softcap"] = 1e3  # which leaves integers apart
    h, w = (torch.randint(-2, 3, x.shape, device=device).to(dtype) for x in (h, w))
    h[::4] = 0
    w = w[:few].repeat(6, 1)[:V].contiguous()
    bias = None if bias is None else torch.zeros_like(bias)
    z_TV = h.double() @ w.double().T
    first_T, last_T = z_TV.argmax(1), V - 1 - z_TV.flip(1).argmax(1)
    ignored_T = y == options.get("ignore_index", -100)
    third = torch.arange(T, device=device) % 3
    target_T = torch.where(third == 0, first_T, torch.where(third == 1, last_T, y.clamp_min(0)))
    y = torch.where(ignored_T, y, target_T)
    forward(tiles, (h, w, y, bias), options := options | launch)
    if len(options["statistics"]) == len(STATISTICS):
        want_T = (first_T == y) & ~ignored_T
        wrong_T = (options["statistics"][5] == 1) != want_T
        assert not wrong_T.any(), f"is_top1 of rows {wrong_T.nonzero().flatten().tolist()}"


def masked(tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape) -> None:
    """A masked vocabulary: as if its columns, whole splits and the tail, were not there."""
    (h, w, y, _), options = make_inputs(shape, dtype, device)
    allowed = shape[2] // 3
    y = y % allowed
    want = forward(tiles, (h, w[:allowed].contiguous(), y, None), options)
    for masked in (-math.inf, torch.finfo(dtype).min):
        bias = torch.zeros(shape[2], dtype=dtype, device=device)
        bias[allowed:] = masked
        got = forward(tiles, (h, w, y, bias), options)
        for name in ("logprob", "entropy", "logsumexp"):
            torch.testing.assert_close(
                getattr(got, name), getattr(want, name), rtol=2e-6, atol=2e-6
            )


def twice(
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    names: tuple[str, ...] = (),
    backward: bool = True,
    **launch: Any,
) -> None:
    """The same bits each time. A bound of the rows changes none; beyond it gradients are NaN."""
    inputs, options = make_inputs(shape, dtype, device, "peaked", names)
    options |= launch
    found, again = (forward(tiles, inputs, options) for _ in range(2))
    assert all(map(torch.equal, found[:5], again[:5])), "two forwards differ"
    if not backward:
        return
    gradients = make_gradients(shape[0], device)
    tile = fitting(tiles[1], inputs, "dlogits")

    def results(**bound: int) -> list[Tensor]:
        return launch_backward(gradients, inputs, found, tile, options | bound)

    exact = results()
    assert all(map(torch.equal, exact, results())), "two backwards differ"
    for x, y in zip(results(max_active_rows=shape[0]), exact, strict=True):
        close(x, y, dtype)
    if shape[0] > 16:
        beyond = results(max_active_rows=shape[0] // 8)
        assert all(x.isnan().all() for x in beyond), "more rows than allowed, and no NaN"


def stored_rows(
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    bounded: bool,
    names: tuple[str, ...] = ("bias", "temperatures"),
    **launch: Any,
) -> None:
    """The logits of all rows, of none, of some, and of more than fit are stored for backward.

    A row that is recomputed has sums of another order than forward's. So both bounds hold where
    all rows are read; otherwise each row of the gradient is one of the two, to the bit.
    """
    inputs, options = make_inputs(shape, dtype, device, "peaked", (*names, "ignore"))
    gradients = make_gradients(shape[0], device)
    options |= launch
    if bounded:
        options["max_active_rows"] = shape[0]
    references = references_of(inputs, gradients, options)

    def storing(above: float | Tensor, rows: int) -> list[Tensor]:
        store = {"store_above": torch.as_tensor(above, device=device), "store_rows": rows}
        return ours(tiles, inputs, gradients, options | store)[1]

    read, recomputed = storing(0.0, shape[0]), storing(math.inf, 3)
    check(read, references, inputs, options)
    for above, rows in ((read[1].median(), shape[0]), (0.0, 2 * shape[0] // 3)):
        got = storing(above, rows)
        either = (got[3] == read[3]).all(1) | (got[3] == recomputed[3]).all(1)
        assert either.all(), f"rows {(~either).nonzero().flatten().tolist()}"
        for x, wanted in zip(got[3:], references[0][3:], strict=True):
            close(x, wanted, dtype)


def numbered(tiles: Tiles, dtype: torch.dtype, device: torch.device, **launch: Any) -> None:
    """Rows with a target, and rows with a gradient, of several programs."""
    from .._triton.head_backward.launch_rows import BLOCK, active_rows

    gradient, _, _ = make_gradients(2 * BLOCK + 5, device, ("logprob alone",))
    assert gradient is not None
    gradient[1] = math.nan
    target = torch.randint(5, gradient.shape, device=device)
    target[::3] = -1
    valid = target != -1
    for gradients, active in (
        (None, valid),
        ((gradient, None, None), valid & (gradient != 0)),
    ):
        found = active_rows(gradients, target, -1, None)
        assert torch.equal(found.rows, active.nonzero().flatten().int()), "other rows"
        places = torch.where(active, active.cumsum(0) - 1, -1)
        assert torch.equal(found.slot, places.int()), "rows in other places"
