"""The launches that tests/test_triton_compile.py compiles: every launcher, every tile we ship.

T tokens, R active rows, D hidden, V vocabulary, B sequences, L their length.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._rows import ForwardRows
from entropy_kernels._triton.common import tiles
from entropy_kernels._triton.head_backward.launch import backward
from entropy_kernels._triton.head_forward.launch import forward
from entropy_kernels._triton.ratio_loss.launch import ratio_loss
from entropy_kernels._triton.selection.launch import radix_histogram, radix_pick, select_largest
from entropy_kernels.head import Head

T, R, V = 8192, 1639, 151936
# D changes no kernel while it is a multiple of every block, so these stand for all. Each takes
# another entry of the table.
HIDDEN = (2048, 4096)
# Options are compiled with the tile that launchers choose for them. Only softcap has tiles of its
# own, so one case has all the other options and one has all. To save time, other combinations are
# left out. So are matrices whose rows are not dense: they are loaded number by number.
OPTIONS = (("bias", "temperature"), ("bias", "temperature", "softcap"))

Cases = dict[str, Callable[[], object]]


def cases(arch: str) -> Cases:
    """The calls for an architecture, by name."""
    return dict([*_head(arch), *_selection(), *_ratio_loss()])


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _head(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile of the table that this architecture can run; then what launchers choose."""
    launches: dict[str, Callable[..., None]] = {"forward": _forward, "dlogits": _backward}
    statistics = partial(_forward, statistics=True)
    bf16, fp16 = torch.bfloat16, torch.float16
    for key, entries in tiles.TILES.items():
        if key.architecture in (arch, "any"):
            dtype = torch.float32 if key.dtype == "float32" else bf16
            for tile in entries:
                if tile.variant in usable(arch):
                    name = f"{key.op} {describe(tile)} {key.dtype}"
                    launch = launches[key.op.split("_")[0]]
                    launch = statistics if "_statistics" in key.op else launch
                    yield name, partial(launch, dtype, HIDDEN[-1], (), tile)
    for op, launch in (launches | {"forward_statistics": statistics}).items():
        for hidden in HIDDEN:
            for options in OPTIONS:
                yield f"{op} D={hidden} {'+'.join(options)}", partial(launch, bf16, hidden, options)
        yield f"{op} float16", partial(launch, fp16, HIDDEN[-1], ())
    # Without an entry of its own in the table, it takes a plainer op's.
    yield "forward_statistics float32", partial(statistics, torch.float32, HIDDEN[-1], ())
    for options in ((), *OPTIONS):
        yield f"stored rows {'+'.join(options)}", partial(_stored_rows, bf16, HIDDEN[-1], options)


def usable(arch: str) -> set[str]:
    """The variants that this architecture and this version of Triton can run."""
    return tiles.variants(arch)


def describe(tile: tiles.Tile) -> str:
    blocks = f"{tile.block_t}x{tile.block_v}x{tile.block_d}"
    return f"{tile.variant} {blocks} warps={tile.num_warps} stages={tile.num_stages}"


def _make_head(dtype: torch.dtype, hidden: int, options: tuple[str, ...]) -> Head:
    return Head(
        _empty(T, hidden, dtype=dtype),
        _empty(V, hidden, dtype=dtype),
        _empty(T, dtype=torch.int64),
        _empty(V, dtype=dtype) if "bias" in options else None,
        _empty(T) if "temperature" in options else None,
        30.0 if "softcap" in options else None,
    )


def _forward(
    dtype: torch.dtype,
    hidden: int,
    options: tuple[str, ...],
    tile: tiles.Tile | None = None,
    *,
    statistics: bool = False,
) -> None:
    head, filled = _make_head(dtype, hidden, options), _empty(4, T) if statistics else None
    forward(head, keep_logits=False, statistics=filled, tile=tile)


def _stored_rows(dtype: torch.dtype, hidden: int, options: tuple[str, ...]) -> None:
    """A forward that stores the logits of rows above a threshold, and its backward."""
    head = _make_head(dtype, hidden, options)
    rows = forward(head, keep_logits=False, store_above=_empty(), store_rows=R)
    _backward(dtype, hidden, options, rows=rows)


def _backward(
    dtype: torch.dtype,
    hidden: int,
    options: tuple[str, ...],
    tile: tiles.Tile | None = None,
    rows: ForwardRows | None = None,
) -> None:
    rows = rows or ForwardRows(*(_empty(T) for _ in range(5)), _empty(0))
    # With options, entropies are differentiated too; a policy loss needs log-probs alone.
    gradients = (_empty(T), _empty(T), _empty(T)) if options else (_empty(T), None, None)
    backward(
        gradients,
        _make_head(dtype, hidden, options),
        rows,
        (True, True, "bias" in options),
        max_active_rows=R,
        tile=tile,
    )


def _selection() -> Iterator[tuple[str, Callable[[], object]]]:
    values, mask, scalar = _empty(T), _empty(T, dtype=torch.bool), _empty(dtype=torch.int64)
    for digit in ((21, 11, 0), (10, 11, 11), (0, 10, 22), (13, 19, 0)):
        yield f"radix_histogram {digit}", partial(radix_histogram, values, mask, scalar, *digit)
    for bits, before, shift in ((11, None, 21), (11, scalar, 10), (10, scalar, 0)):
        counts = _empty(1 << bits, dtype=torch.int64)
        launch = partial(radix_pick, counts, counts, scalar, before, 0.2, shift)
        yield f"radix_pick shift={shift}", launch
    yield "select_largest", partial(select_largest, values, mask, _empty(), scalar)


def _ratio_loss() -> Iterator[tuple[str, Callable[[], object]]]:
    for sequences, dual_clip in ((8, None), (1, 3.0)):
        tokens = [_empty(sequences, T // sequences) for _ in range(3)]
        selected = _empty(sequences, T // sequences, dtype=torch.bool)
        arguments: list[Any] = [*tokens, selected, _empty(sequences), 0.2, 0.28, dual_clip, 20.0]
        yield f"ratio_loss sequences={sequences}", partial(ratio_loss, *arguments)
