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

from .. import device as gpu
from .. import reference
from .._bounds import GpuArithmetic
from .._rows import ForwardRows
from ..head import Head
from . import truth
from .launches import Inputs, launch_backward, launch_forward
from .truth import ROWS, Results, bend, peaked_head, three_of

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
ACTIVE = 0.5
Tiles = tuple[Any, Any]
Shape = tuple[int, int, int]


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
        *((f"shape: {name}", _compare, x) for name, x in shapes.items()),
        *((f"rows: {rows}", _compare, shape, rows) for rows in ROWS),
        *((f"options: {name}", _compare, shape, "peaked", x) for name, x in OPTIONS.items()),
        ("rows without an answer", _no_answer, shape),
        ("a masked vocabulary", _masked, shape),
        ("statistics", _check_statistics, shape),
        ("same bits twice", _twice, shape),
    ]
    if tiles[0] is None or tiles[0].variant == "cublas":
        found += [
            ("stored rows", _stored_rows, shape, False),
            ("stored rows, bounded", _stored_rows, shape, True),
        ]
    return [Case(name, partial(run, tiles, dtype, device, *rest)) for name, run, *rest in found]


def offset_cases(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, small: bool = False
) -> list[Case]:
    """Tensors of more than 2^31 elements: an address in 32 bits reads elsewhere, or nothing."""
    big = 1 << (12 if small else 31)
    found = []
    for name, shape in {
        "hidden": (big // 32 + 3, 32, 40) if small else (big // 4096 + 3, 4096, 264),
        "weight": (9, 32, big // 32 + 5) if small else (130, 16384, big // 16384 + 5),
        "logits": (67, 32, 61) if small else (big // 65536 + 70, 64, 65537),
        "stored rows": (67, 32, 61) if small else (big // 65536 + 70, 64, 65537),
    }.items():
        options: dict[str, Any] = {"keep_logits": name == "logits"}
        if name == "stored rows":
            options |= {"store_above": torch.zeros((), device=device), "store_rows": shape[0]}
        run = partial(_last_rows, tiles, dtype, device, shape, options)
        found.append(Case(f"2^31: {name}", run, 7 * 2 * big))
    return found


def _inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rows: str = "peaked",
    options: tuple[str, ...] = (),
) -> tuple[Inputs, dict[str, Any]]:
    """Hidden states, weight, targets and bias of one kind of rows, and the options of the head."""
    T, D, V = shape
    seed = int(torch.randint(1 << 30, ()))
    h, w, y = bend(rows, *peaked_head(T, D, V, torch.float32, device, seed))
    h, w = h.to(dtype), w.to(dtype)
    if "strided" in options:
        h, w = (torch.stack([x, x.neg()], 2).flatten(1)[:, ::2] for x in (h, w))
    chosen: dict[str, Any] = {"keep_logits": True} if "keep" in options else {}
    if "ignore" in options:
        y[::3] = chosen["ignore_index"] = -1
    if "softcap" in options:
        chosen["softcap"] = 5.0
    if "temperature" in options:
        chosen["temperature"] = torch.full((1,), 0.7, device=device)
    if "temperatures" in options:
        chosen["temperature"] = torch.rand(T, device=device) + 0.5
    bias = torch.randn(V, device=device).to(dtype) if "bias" in options else None
    return (h, w, y, bias), chosen


def _ours(
    tiles: Tiles, inputs: Inputs, gradients: list[Tensor], options: dict[str, Any]
) -> list[Tensor]:
    """Three outputs and the gradients of hidden, weight and bias."""
    found = _forward(tiles, inputs, options)
    got = launch_backward(list(gradients), inputs, found, _fitting(tiles[1], inputs), options)
    return [found.logprob, found.entropy, found.logsumexp, *got]


def _forward(tiles: Tiles, inputs: Inputs, options: dict[str, Any]) -> ForwardRows:
    # Few variants can keep logits.
    keeps = options.get("keep_logits") or "store_above" in options
    tile = None if keeps else _fitting(tiles[0], inputs)
    return launch_forward(inputs, tile, options)


def _fitting(tile: Any, inputs: Inputs) -> Any:
    """`tile`; or None, for the table to choose, where its variant cannot take these matrices."""
    from .._triton.common import tiles

    usable = tiles.variants(gpu.architecture(inputs[0].device), *inputs[:2])
    return tile if tile is None or tile.variant in usable else None


def _references(
    inputs: Inputs, gradients: list[Tensor], options: dict[str, Any]
) -> tuple[Results, ...]:
    """Outputs and gradients in fp64, in the dtype of the inputs, and in fp32."""
    names = ("temperature", "softcap", "ignore_index")
    head = {name: options[name] for name in names if name in options}
    return three_of(inputs, gradients, **head)


def _gradients(tokens: int, device: torch.device) -> list[Tensor]:
    some = torch.rand(3, tokens, device=device) < ACTIVE
    return list(torch.randn(3, tokens, device=device) * some)


def _check(
    got: list[Tensor], references: tuple[Results, ...], inputs: Inputs, options: dict[str, Any]
) -> None:
    """Both bounds, for outputs and gradients; 16-bit kernels round dz for its products."""
    # Allowed in the interpreter too: what a GPU may not do is refused there.
    arithmetic = GpuArithmetic.of(*inputs[:2], **options)
    truth.check_results(got, references, arithmetic, inputs[0].dtype)


def _compare(
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    rows: str = "peaked",
    names: tuple[str, ...] = (),
) -> None:
    inputs, options = _inputs(shape, dtype, device, rows, names)
    gradients = _gradients(shape[0], device)
    got = _ours(tiles, inputs, gradients, options)
    _check(got, _references(inputs, gradients, options), inputs, options)
    if "ignore" in names:
        assert not any(x[::3].any() for x in got[:4])


def _no_answer(tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape) -> None:
    """NaN and infinities, targets outside [0, V) and temperatures that are not positive make NaN
    of their rows, and of theirs alone. An ignored row among them is 0."""
    (h, w, y, b), _ = _inputs(shape, dtype, device)
    temperature = torch.ones(shape[0], device=device)
    h[3, 0], h[5, 1], h[6, 2], y[7], y[9] = math.nan, math.inf, -math.inf, shape[2], -1
    temperature[11], temperature[14], y[8] = 0, -1, -100
    h[8, 0] = math.nan
    wrong = torch.zeros(shape[0], dtype=torch.bool, device=device)
    wrong[[3, 5, 6, 7, 9, 11, 14]] = True
    options = {"temperature": temperature}
    found = _forward(tiles, (h, w, y, b), options)
    for name, x in found._asdict().items():
        if name not in ("logits", "places"):
            assert torch.equal(x.isnan(), wrong), f"{name}: rows {x.isnan().nonzero().flatten()}"
            assert x[8] == 0, name
    nothing = torch.full((shape[2],), -math.inf, dtype=dtype, device=device)
    for x in _forward(tiles, (h, w, y, nothing), options)[:3]:
        assert x.isnan().sum() == len(x) - 1


def _masked(tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape) -> None:
    """A masked vocabulary: as if its columns, whole splits and the tail, were not there."""
    (h, w, y, _), options = _inputs(shape, dtype, device)
    allowed = shape[2] // 3
    y = y % allowed
    want = _forward(tiles, (h, w[:allowed].contiguous(), y, None), options)
    for masked in (-math.inf, torch.finfo(dtype).min):
        bias = torch.zeros(shape[2], dtype=dtype, device=device)
        bias[allowed:] = masked
        got = _forward(tiles, (h, w, y, bias), options)
        for name in ("logprob", "entropy", "logsumexp"):
            torch.testing.assert_close(
                getattr(got, name), getattr(want, name), rtol=2e-6, atol=2e-6
            )


def _check_statistics(tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape) -> None:
    """Varentropy, largest probability, and the sums of p^2 and p^2 log p."""
    inputs, options = _inputs(shape, dtype, device, "peaked", ("temperatures", "ignore"))
    got = torch.full((4, shape[0]), math.nan, device=device)
    # Without the variant that the table has no use for here.
    forward = None if tiles[0] is not None and tiles[0].variant == "tma_ws" else tiles[0]
    _forward((forward, tiles[1]), inputs, options | {"statistics": got})
    # A largest p of 1/2 is off by a whole rounding of a logit.
    three = truth.three_statistics(*inputs[:3], **options)
    truth.check_statistics(got, three, GpuArithmetic.of(*inputs[:2], **options), factor=3.0)


def _twice(tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape) -> None:
    inputs, options = _inputs(shape, dtype, device)
    gradients = _gradients(shape[0], device)
    first, second = (_ours(tiles, inputs, gradients, options) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y), "two runs differ"


def _stored_rows(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape, bounded: bool
) -> None:
    """The logits of all rows, of none, of some, and of more than fit are stored for backward.

    A row that is recomputed has sums of another order than forward's, so only where all are read
    both bounds hold; otherwise each row of the gradient is one of the two, to the bit.
    """
    inputs, options = _inputs(shape, dtype, device, "peaked", ("bias", "temperatures", "ignore"))
    gradients = _gradients(shape[0], device)
    if bounded:
        options["max_active_rows"] = shape[0]
    references = _references(inputs, gradients, options)

    def storing(above: float | Tensor, rows: int) -> list[Tensor]:
        store = {"store_above": torch.as_tensor(above, device=device), "store_rows": rows}
        return _ours(tiles, inputs, gradients, options | store)

    read, recomputed = storing(0.0, shape[0]), storing(math.inf, 3)
    _check(read, references, inputs, options)
    for above, rows in ((read[1].median(), shape[0]), (0.0, 2 * shape[0] // 3)):
        got = storing(above, rows)
        either = (got[3] == read[3]).all(1) | (got[3] == recomputed[3]).all(1)
        assert either.all(), f"rows {(~either).nonzero().flatten().tolist()}"
        for x, wanted in zip(got[3:], references[0][3:], strict=True):
            _close(x, wanted, dtype)


def _last_rows(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape, options: dict[str, Any]
) -> None:
    """The rows whose offsets pass 2^31 against fp64, with a gradient at the last ones only."""
    T, D, V = shape
    generator = torch.Generator(device).manual_seed(int(torch.randint(1 << 30, ())))
    h = torch.empty(T, D, dtype=dtype, device=device).normal_(generator=generator)
    w = torch.empty(V, D, dtype=dtype, device=device).normal_(generator=generator).mul_(D**-0.5)
    y = torch.randint(V, (T,), device=device, generator=generator)
    last = slice(max(T - 64, 0), T)
    y[last] = V - 1 - torch.arange(T - last.start, device=device) % V
    gradients = [torch.zeros(T, device=device) for _ in range(3)]
    for gradient in gradients:
        gradient[last] = torch.randn(T - last.start, device=device)
    got = _ours(tiles, (h, w, y, None), gradients, options)
    # Few rows and few columns of the weight's gradient are enough, and fp64 of all would not fit.
    rows = (h[last].contiguous(), w, y[last], None)
    kept = [g[last] for g in gradients]
    want = _blocked_reference(rows, kept)
    for x, wanted in zip([g[last] for g in got[:4]], want[:4], strict=True):
        _close(x, wanted, dtype)
    assert not got[3][: last.start].any(), "a row without gradient has one"
    columns = slice(max(V - 256, 0), V)
    _close(got[4][columns], want[4][columns], dtype)


def _blocked_reference(inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """fp64 results of few rows without fp64 copies of the whole weight."""
    h, w, y, _ = inputs
    blocks = w.split(1 << 13)
    z = torch.cat([h.double() @ block.double().T for block in blocks], 1).requires_grad_()
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) if z.shape[1] < 4096 else None
    outputs = (
        _statistics(z, y) if eye is None else reference.linear_logprob_entropy(Head(z, eye, y))
    )
    torch.autograd.backward(outputs, [g.double() for g in gradients])
    dz = z.grad
    assert dz is not None
    starts = range(0, w.shape[0], 1 << 13)
    dh = torch.zeros(h.shape, dtype=torch.float64, device=h.device)
    for start, block in zip(starts, blocks, strict=True):
        dh += dz[:, start : start + len(block)] @ block.double()
    dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
    tail = slice(max(w.shape[0] - 256, 0), w.shape[0])
    dw[tail] = (dz[:, tail].T @ h.double()).float()
    return [*(x.detach() for x in outputs), dh, dw]


def _statistics(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = z.log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, y.unsqueeze(1)).squeeze(1), entropy, z.logsumexp(1)


def _close(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    allowed = 1e-5 if got.dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    assert error <= allowed, f"off by {error:.1e} of the norm; {allowed:.1e} is allowed"
