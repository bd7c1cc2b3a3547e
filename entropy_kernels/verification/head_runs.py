"""What the cases of the head share: inputs, the runs of a pair of tiles, and how they are judged.

T tokens, D hidden, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import device as gpu
from .._bounds import GpuArithmetic, assert_within_two_bounds
from .._rows import FILLED_BY_CSRC_CUDA, ForwardRows
from .._triton.common import cutlass
from .._triton.common.tiles import TMA, variants
from . import truth
from .launches import Inputs, launch_backward, launch_forward
from .truth import Results, bend, peaked_head, three_of

ACTIVE = 0.5
# How many fp32 orders judge a case.
ORDERS = 4
Tiles = tuple[Any, Any]
Shape = tuple[int, int, int]


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rows: str = "peaked",
    options: tuple[str, ...] = (),
) -> tuple[Inputs, dict[str, Any]]:
    """Hidden states, weight, targets and bias of one kind of rows, and the options of the head."""
    T, D, V = shape
    seed = int(torch.randint(1 << 30, ()))
    h, w, y = bend(rows, *peaked_head(T, D, V, torch.float32, device, seed, rows == "wide"))
    h, w = h.to(dtype), w.to(dtype)
    if "strided" in options:
        h, w = (torch.stack([x, x.neg()], 2).flatten(1)[:, ::2] for x in (h, w))
    chosen: dict[str, Any] = {"keep_logits": True} if "keep" in options else {}
    if "store" in options:
        chosen |= {"store_above": torch.zeros((), device=device), "store_rows": T}
    if "statistics" in options:
        chosen["statistics"] = torch.full((6, T), math.nan, device=device)
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


def ours(
    tiles: Tiles,
    inputs: Inputs,
    gradients: list[Tensor | None] | None,
    options: dict[str, Any],
) -> tuple[ForwardRows, list[Tensor]]:
    """The forward; and its outputs with, for `gradients`, those of hidden, weight and bias."""
    found = forward(tiles, inputs, options)
    got = [found.logprob, found.entropy, found.logsumexp]
    if gradients is not None:
        tile = fitting(tiles[1], inputs, "dlogits")
        got += launch_backward(gradients, inputs, found, tile, options)
    return found, got


def forward(tiles: Tiles, inputs: Inputs, options: dict[str, Any]) -> ForwardRows:
    tile = fitting(tiles[0], inputs, "forward")
    # Few variants can keep logits, and specialised warps have no room for statistics.
    store_none = (*TMA, "pointer", cutlass.VARIANT)
    without = {"keep_logits": TMA, "store_above": store_none, "statistics": ("tma_ws",)}
    if any(tile and options.get(x) is not None and tile.variant in without[x] for x in without):
        tile = None
    if tile and tile.variant == cutlass.VARIANT and "statistics" in options:
        options["statistics"] = options["statistics"][:FILLED_BY_CSRC_CUDA]
    return launch_forward(inputs, tile, options)


def fitting(tile: Any, inputs: Inputs, op: str) -> Any:
    """`tile`; or None, for the table to choose, where its variant cannot take these matrices."""
    arch, hidden, weight = gpu.architecture(inputs[0].device), *inputs[:2]
    usable = variants(arch, hidden, weight)
    usable |= cutlass.variants(op, arch, hidden.dtype, hidden.shape[1], weight)
    return tile if tile is None or tile.variant in usable else None


def references_of(
    inputs: Inputs, gradients: list[Tensor | None] | None, options: dict[str, Any]
) -> tuple[Results, ...]:
    """Outputs and gradients in fp64, in the dtype of the inputs, and in fp32."""
    orders = options.get("orders", ORDERS)
    return three_of(inputs, gradients, orders, **of_head(options))


def of_head(options: dict[str, Any]) -> dict[str, Any]:
    names = ("temperature", "softcap", "ignore_index")
    return {name: options[name] for name in names if name in options}


def make_gradients(
    tokens: int, device: torch.device, names: tuple[str, ...] = ()
) -> list[Tensor | None]:
    """What arrives at log-prob, entropy and log-sum-exp."""
    some = torch.rand(3, tokens, device=device) < ACTIVE
    logprob, *others = torch.randn(3, tokens, device=device) * some
    return [logprob, None, None] if "logprob alone" in names else [logprob, *others]


def check(
    got: list[Tensor], references: tuple[Results, ...], inputs: Inputs, options: dict[str, Any]
) -> None:
    """Both bounds, for outputs and gradients; 16-bit kernels round dz for its products."""
    truth.check_results(got, references, arithmetic_of(inputs, options), inputs[0].dtype)


def arithmetic_of(inputs: Inputs, options: dict[str, Any]) -> GpuArithmetic:
    """Allowed in the interpreter too: what a GPU may not do is refused there."""
    emulated = options.get("orders", ORDERS) > 0
    return GpuArithmetic.of(*inputs[:2], **of_head(options), emulated=emulated)


def check_logits(found: ForwardRows, inputs: Inputs, valid: Tensor) -> None:
    """The logits that are stored for backward, of all valid rows or of those with a place."""
    h, w = inputs[0][valid], inputs[1]
    places = torch.arange(len(valid), device=valid.device)
    places = (places if found.places is None else found.places)[valid]
    assert (places >= 0).all(), "a row that fits has no place"
    z, plain = h.double() @ w.double().T, h.float() @ w.float().T
    more = GpuArithmetic(h.shape[1], float(z.abs().amax()), h.dtype, emulated=False).logit
    assert_within_two_bounds(found.logits[places.long()], z, plain, plain, allowance=more)


def close(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    allowed = 1e-5 if got.dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    assert error <= allowed, f"off by {error:.1e} of the norm; {allowed:.1e} is allowed"
