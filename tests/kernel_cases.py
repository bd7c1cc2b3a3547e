"""The cases of the head's correctness: shapes, rows, options and offsets, forward and backward.

T tokens, D hidden, V vocabulary.
"""

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import environment
from benchmarks.gpu.ours import TRITON, Inputs, launch_backward, launch_forward
from entropy_kernels import reference
from entropy_kernels._bench.step import peaked_head
from entropy_kernels._rows import ForwardRows
from entropy_kernels.testing import assert_within_two_bounds

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
QUICK_SHAPES = {"one": (1, 1, 1), "prime": (31, 37, 301)}
ROWS = ("peaked", "uniform", "tied", "very negative", "large")
OPTIONS: dict[str, tuple[str, ...]] = {
    "bias": ("bias",),
    "temperature": ("temperature",),
    "a temperature a token": ("temperatures",),
    "softcap": ("softcap",),
    "ignored rows": ("ignore",),
    "strided": ("strided",),
    "all options": ("bias", "temperatures", "softcap", "ignore", "strided"),
}
QUICK_OPTIONS = ("all options",)
KEPT = 0.5


class Case(NamedTuple):
    """A name, a call that raises AssertionError where a result is wrong, and the bytes it needs."""

    name: str
    run: Callable[[], None]
    bytes: int = 0


def cases(tiles: tuple[Any, Any], dtype: torch.dtype, device: torch.device, quick: bool):
    """The cases of a forward and a dlogits tile in one dtype; every one draws new numbers."""
    found: list[Case] = []

    def add(name: str, shape: tuple[int, int, int], rows: str = "peaked", *options: str) -> None:
        def run() -> None:
            _compare(tiles, shape, dtype, device, rows, options)

        found.append(Case(name, run))

    for name, shape in (QUICK_SHAPES if quick else SHAPES).items():
        add(f"shape: {name}", shape)
    small = (31, 24, 301) if quick else (200, 128, 5003)
    for rows in ROWS:
        add(f"rows: {rows}", small, rows)
    for name, options in OPTIONS.items():
        if not quick or name in QUICK_OPTIONS:
            add(f"options: {name}", small, "peaked", *options)
    found.append(Case("rows without an answer", lambda: _no_answer(tiles, small, dtype, device)))
    found.append(Case("-inf logits", lambda: _minus_infinity(tiles, small, dtype, device)))
    found.append(Case("moments", lambda: _moments(tiles, small, dtype, device)))
    found.append(Case("same bits twice", lambda: _twice(tiles, small, dtype, device)))
    if tiles[0] is None or tiles[0].variant == "cublas":
        for bounded in (False, True):
            name = f"kept rows{', bounded' * bounded}"
            run = partial(_kept_rows, tiles, small, dtype, device, bounded)
            found.append(Case(name, run))
    return found


def offset_cases(tiles: tuple[Any, Any], dtype: torch.dtype, device: torch.device, quick: bool):
    """Tensors of more than 2^31 elements: an address in 32 bits reads elsewhere, or nothing."""
    big = (1 << 31) if not quick else 1 << 12
    found = []
    for name, shape in {
        "hidden": (big // 4096 + 3, 4096, 264) if not quick else (big // 32 + 3, 32, 40),
        "weight": (130, 16384, big // 16384 + 5) if not quick else (9, 32, big // 32 + 5),
        "logits": (big // 65536 + 70, 64, 65537) if not quick else (67, 32, 61),
        "kept rows": (big // 65536 + 70, 64, 65537) if not quick else (67, 32, 61),
    }.items():
        options: dict[str, Any] = {"keep_logits": name == "logits"}
        if name == "kept rows":
            options |= {"keep_above": torch.zeros((), device=device), "keep_rows": shape[0]}
        run = partial(_last_rows, tiles, shape, dtype, device, options)
        found.append(Case(f"2^31: {name}", run, 7 * 2 * big))
    return found


def _inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rows: str,
    options: tuple[str, ...],
) -> tuple[Inputs, dict[str, Any]]:
    """Hidden states, weight, targets and bias of one kind of rows, and the options of the head."""
    T, D, V = shape
    seed = int(torch.randint(1 << 30, ()))
    h, w, y = peaked_head(T, D, V, torch.float32, device, seed)
    if rows == "uniform":
        h.zero_()
    elif rows == "tied":
        w = w[: max(V // 2, 1)].repeat(3, 1)[:V]
    elif rows == "very negative":
        h[:, 0], w[:, 0] = 20.0, -20.0
    elif rows == "large":
        h = h / h.norm(dim=1, keepdim=True).clamp_min(1e-6) * 200
    h, w = h.to(dtype), w.to(dtype)
    if "strided" in options:
        h, w = (torch.stack([x, x.neg()], 2).flatten(1)[:, ::2] for x in (h, w))
    chosen: dict[str, Any] = {}
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
    tiles: tuple[Any, Any], inputs: Inputs, gradients: list[Tensor], options: dict[str, Any]
) -> list[Tensor]:
    """Three outputs and the gradients of hidden, weight and bias."""
    found = _forward(tiles, inputs, options)
    got = launch_backward(list(gradients), inputs, found, _fitting(tiles[1], inputs), options)
    return [found.logprob, found.entropy, found.logsumexp, *got]


def _forward(tiles: tuple[Any, Any], inputs: Inputs, options: dict[str, Any]) -> ForwardRows:
    # Few variants can keep logits.
    keeps = options.get("keep_logits") or "keep_above" in options
    tile = None if keeps else _fitting(tiles[0], inputs)
    return launch_forward(inputs, tile, options)


def _fitting(tile: Any, inputs: Inputs) -> Any:
    """`tile`; or None, for the table to choose, where its variant cannot take these matrices."""
    module = importlib.import_module(f"{TRITON}.tiles")
    arch = environment.architecture(inputs[0].device)
    usable = module.variants(arch, inputs[0], inputs[1])
    return tile if tile is None or tile.variant in usable else None


def _reference(
    inputs: Inputs, gradients: list[Tensor], options: dict[str, Any], dtype: torch.dtype
) -> list[Tensor]:
    h, w, y, b = inputs
    leaves = [x.detach().to(dtype).requires_grad_() for x in (h, w, b) if x is not None]
    temperature = options.get("temperature")
    outputs = reference.linear_logprob_entropy(
        leaves[0],
        leaves[1],
        y,
        None if b is None else leaves[2],
        1.0 if temperature is None else temperature,
        options.get("softcap"),
        options.get("ignore_index", -100),
    )
    torch.autograd.backward(outputs, [g.to(dtype) for g in gradients])
    return [x.detach() for x in outputs] + [_grad(x) for x in leaves]


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _gradients(tokens: int, device: torch.device) -> list[Tensor]:
    some = torch.rand(3, tokens, device=device) < KEPT
    return list(torch.randn(3, tokens, device=device) * some)


def _compare(
    tiles: tuple[Any, Any],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rows: str,
    options: tuple[str, ...],
) -> None:
    """Both bounds, for outputs and gradients; 16-bit kernels round dz for its products."""
    inputs, chosen = _inputs(shape, dtype, device, rows, options)
    gradients = _gradients(shape[0], device)
    got = _ours(tiles, inputs, gradients, chosen)
    others = [
        _reference(inputs, gradients, chosen, kind)
        for kind in (torch.float64, dtype, torch.float32)
    ]
    for number, quartet in enumerate(zip(got, *others, strict=True)):
        assert_within_two_bounds(*quartet, operands=torch.float32 if number < 3 else dtype)


def _no_answer(tiles, shape, dtype, device) -> None:
    """NaN and inf logits and targets outside [0, V) make NaN of their rows, and of theirs alone."""
    (h, w, y, b), options = _inputs(shape, dtype, device, "peaked", ())
    h[3, 0], h[5, 1], y[7] = math.nan, math.inf, shape[2]
    found = _forward(tiles, (h, w, y, b), options)
    wrong = torch.zeros(shape[0], dtype=torch.bool, device=device)
    wrong[[3, 5, 7]] = True
    for name, x in found._asdict().items():
        if name not in ("logits", "places"):
            assert torch.equal(x.isnan(), wrong), f"{name}: rows {x.isnan().nonzero().flatten()}"


def _minus_infinity(tiles, shape, dtype, device) -> None:
    """A masked vocabulary: as if its columns were not there."""
    (h, w, y, _), options = _inputs(shape, dtype, device, "peaked", ())
    allowed = shape[2] // 3
    y = y % allowed
    bias = torch.zeros(shape[2], dtype=dtype, device=device)
    bias[allowed:] = -math.inf
    got = _forward(tiles, (h, w, y, bias), options)
    want = _forward(tiles, (h, w[:allowed].contiguous(), y, None), options)
    for name in ("logprob", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-6, atol=2e-6)


def _moments(tiles, shape, dtype, device) -> None:
    """Varentropy, largest probability, and the sums of p^2 and p^2 log p."""
    inputs, options = _inputs(shape, dtype, device, "peaked", ("temperatures", "ignore"))
    moments = torch.full((4, shape[0]), math.nan, device=device)
    # Without the variant that the table has no use for here.
    forward = None if tiles[0] is not None and tiles[0].variant == "tma_ws" else tiles[0]
    _forward((forward, tiles[1]), inputs, options | {"moments": moments})
    h, w, y, _ = inputs
    head = options["temperature"], None, options["ignore_index"]

    def expected(kind: torch.dtype, order: Any = slice(None)) -> tuple[Tensor, ...]:
        return reference.head_statistics(h[:, order].to(kind), w[:, order].to(kind), y, None, *head)

    # A largest p of 1/2 is off by a whole rounding of a logit, and each order of summation rounds
    # differently: the worst of a few is the bound.
    orders = [torch.randperm(shape[1], device=device) for _ in range(4)]
    plain = [expected(torch.float32, order) for order in orders]
    for got, truth, eager, *others in zip(
        moments, expected(torch.float64), expected(dtype), *plain, strict=True
    ):
        errors = [float((x.double() - truth).abs().max()) for x in others]
        worst = others[errors.index(max(errors))]
        eager = worst if dtype == torch.float32 else eager
        assert_within_two_bounds(got, truth, eager, worst, factor=3.0)


def _twice(tiles, shape, dtype, device) -> None:
    inputs, options = _inputs(shape, dtype, device, "peaked", ())
    gradients = _gradients(shape[0], device)
    first, second = (_ours(tiles, inputs, gradients, options) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y), "two runs differ"


def _kept_rows(tiles, shape, dtype, device, bounded: bool) -> None:
    """Of all rows, of none, of some, of more than fit; gradients at rows kept and not kept.

    A row that is recomputed has sums of another order than forward's, so only where all are read
    both bounds hold; otherwise each row of the gradient is one of the two, to the bit.
    """
    inputs, options = _inputs(shape, dtype, device, "peaked", ("bias", "temperatures", "ignore"))
    gradients = _gradients(shape[0], device)
    if bounded:
        options["max_active_rows"] = shape[0]
    truth, *others = (
        _reference(inputs, gradients, options, kind)
        for kind in (torch.float64, dtype, torch.float32)
    )

    def kept(above: float | Tensor, rows: int) -> list[Tensor]:
        keep = {"keep_above": torch.as_tensor(above, device=device), "keep_rows": rows}
        return _ours(tiles, inputs, gradients, options | keep)

    read, recomputed = kept(0.0, shape[0]), kept(math.inf, 3)
    for number, quartet in enumerate(zip(read, truth, *others, strict=True)):
        assert_within_two_bounds(*quartet, operands=torch.float32 if number < 3 else dtype)
    for above, rows in ((read[1].median(), shape[0]), (0.0, 2 * shape[0] // 3)):
        got = kept(above, rows)
        either = (got[3] == read[3]).all(1) | (got[3] == recomputed[3]).all(1)
        assert either.all(), f"rows {(~either).nonzero().flatten().tolist()}"
        for x, wanted in zip(got[3:], truth[3:], strict=True):
            _close(x, wanted, dtype)


def _last_rows(tiles, shape, dtype, device, options) -> None:
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
    for x, truth in zip([g[last] for g in got[:4]], want[:4], strict=True):
        _close(x, truth, dtype)
    assert not got[3][: last.start].any(), "a row without gradient has one"
    columns = slice(max(V - 256, 0), V)
    _close(got[4][columns], want[4][columns], dtype)


def _blocked_reference(inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """fp64 results of few rows without fp64 copies of the whole weight."""
    h, w, y, _ = inputs
    blocks = w.split(1 << 13)
    z = torch.cat([h.double() @ block.double().T for block in blocks], 1).requires_grad_()
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) if z.shape[1] < 4096 else None
    outputs = _statistics(z, y) if eye is None else reference.linear_logprob_entropy(z, eye, y)
    torch.autograd.backward(outputs, [g.double() for g in gradients])
    dz = _grad(z)
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
