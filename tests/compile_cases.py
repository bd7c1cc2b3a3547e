"""The launches that tests/test_triton_compile.py compiles: every op with every tile it can meet.

The launchers say which tiles a call can meet. Options that one element of the epilogue feels alike
come together; bf16 gets every set of these groups, and other sizes. fp16 takes the tiles and the
code of bf16, and fp32 is for tests: both get none and all, and fp32 all at odd sizes. Left out are
matrices whose rows are not dense and hidden sizes that no block divides: both are loaded number by
number.

T tokens, R active rows, D hidden, V vocabulary, B sequences, L their length, P pairs.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._rows import ForwardRows
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels._triton.head_backward import launch as head_backward
from entropy_kernels._triton.head_forward import launch as head_forward
from entropy_kernels._triton.pair_products.launch import pair_dots, pair_sums
from entropy_kernels._triton.ratio_loss.launch import ratio_loss
from entropy_kernels._triton.sampling.launch import entropy_from_logits
from entropy_kernels._triton.selection.launch import radix_histogram, radix_pick, select_largest
from entropy_kernels.head import Head

# Each D takes other entries of the table; beyond that it changes no kernel while every block
# divides it.
HIDDEN = (1024, 2048, 4096)
# T, R and V. Compilers know which of them are multiples of 16; "odd" sizes are not. "narrow" is a
# split of one block of columns.
SIZES = {"": (8192, 1640, 32768), "odd": (8191, 1639, 50257), "narrow": (8192, 1640, 64)}
FORWARD = (("bias", "temperature"), ("softcap",), ("statistics",), ("keep_logits",))
DLOGITS = (("bias", "bias_gradient"), ("softcap",), ("entropy",), ("stored",))
READING = (("bias", "bias_gradient", "temperature"), ("softcap",), ("entropy",))
Flags = tuple[str, ...]
Groups = tuple[Flags, ...]


class Case(NamedTuple):
    """One call of a launcher. Several may launch the same kernel."""

    op: str
    dtype: str
    tile: Tile | None
    flags: Flags
    launch: Callable[[], object]


def cases() -> Iterator[Case]:
    """The calls that are possible on the architecture that `device` tells."""
    seen = set()
    others = (_selection(), _ratio_loss(), _support(), _entropy_from_logits())
    for case in itertools.chain(_forwards(), _backwards(), *others):
        if case[:4] not in seen:
            seen.add(case[:4])
            yield case


def combinations(groups: Groups, dtype: torch.dtype) -> Iterator[Flags]:
    """Sets of options; then none and all of them at other sizes."""
    every = tuple(itertools.chain(*groups))
    if dtype != torch.bfloat16:
        yield from ((), every)
        if dtype == torch.float32:
            yield (*every, "odd")
        return
    for number in range(len(groups) + 1):
        for chosen in itertools.combinations(groups, number):
            yield tuple(itertools.chain(*chosen))
    for size in ("odd", "narrow"):
        yield from ((size,), (*every, size))


def sizes(flags: Flags) -> tuple[int, int, int]:
    return next(SIZES[name] for name in (*flags, "") if name in SIZES)


def _heads(groups: Groups) -> Iterator[tuple[torch.dtype, Flags, Head]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for flags, hidden in itertools.product(combinations(groups, dtype), HIDDEN):
            yield dtype, flags, _make_head(dtype, hidden, flags)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _make_head(dtype: torch.dtype, hidden: int, flags: Flags) -> Head:
    count, _, vocabulary = sizes(flags)
    return Head(
        _empty(count, hidden, dtype=dtype),
        _empty(vocabulary, hidden, dtype=dtype),
        _empty(count, dtype=torch.int64),
        _empty(vocabulary, dtype=dtype) if "bias" in flags else None,
        _empty(count) if "temperature" in flags else None,
        30.0 if "softcap" in flags else None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _forwards() -> Iterator[Case]:
    for dtype, flags, head in _heads(FORWARD):
        options = {name: name in flags for name in ("keep_logits", "statistics")}
        for tile in head_forward.preferred(head, **options):
            yield Case("forward", _name(dtype), tile, flags, partial(_forward, head, flags, tile))
    # What stores rows has no options of its own.
    head = _make_head(torch.bfloat16, HIDDEN[-1], ())
    for tile in head_forward.preferred(head, stores_rows=True):
        launch = partial(_forward, head, ("stored",), tile)
        yield Case("forward", "bfloat16", tile, ("stored",), launch)


def _forward(head: Head, flags: Flags, tile: Tile) -> None:
    head_forward.forward(
        head,
        keep_logits="keep_logits" in flags,
        store_above=_empty() if "stored" in flags else None,
        store_rows=1,
        statistics=_empty(6, head.hidden.shape[0]) if "statistics" in flags else None,
        tile=tile,
    )


def _backwards() -> Iterator[Case]:
    for dtype, flags, head in _heads(DLOGITS):
        for tile in head_backward.preferred(head.hidden, head):
            launch = partial(_backward, head, flags, tile)
            yield Case("dlogits", _name(dtype), tile, flags, launch)
    for chosen in combinations(READING, torch.bfloat16):
        flags = (*chosen, "keep_logits")
        head = _make_head(torch.bfloat16, HIDDEN[-1], flags)
        yield Case("dlogits", "bfloat16", None, flags, partial(_backward, head, flags, None))


def _backward(head: Head, flags: Flags, tile: Tile | None) -> None:
    """Gradients arrive for logprob, and with "entropy" for all three results."""
    (count, active, vocabulary), places, logits = sizes(flags), None, _empty(0)
    if "stored" in flags:
        logits, places = _empty(active, vocabulary), _empty(count, dtype=torch.int32)
    if "keep_logits" in flags:
        logits = _empty(count, vocabulary)
    others = _empty(count) if "entropy" in flags else None
    head_backward.backward(
        (_empty(count), others, others),
        head,
        ForwardRows(*(_empty(count) for _ in range(5)), logits, places),
        (True, True, "bias_gradient" in flags),
        max_active_rows=active,
        tile=tile,
    )


def _selection() -> Iterator[Case]:
    """With and without a mask; the second number of values takes several blocks per program."""
    scalar = _empty(dtype=torch.int64)
    for count, flags in itertools.product((8192, 1 << 22), ((), ("mask",))):
        values = _empty(count)
        mask = _empty(count, dtype=torch.bool) if flags else None
        launches = [partial(select_largest, values, mask, _empty(), scalar)]
        for digit in ((21, 11, 0), (10, 11, 11), (0, 10, 22), (13, 19, 0)):
            launches.append(partial(radix_histogram, values, mask, scalar, *digit))
        for bits, before, shift in ((11, None, 21), (11, scalar, 10), (10, scalar, 0)):
            counts = _empty(1 << bits, dtype=torch.int64)
            launches.append(partial(radix_pick, counts, counts, scalar, before, 0.2, shift))
        size = (f"N={count}",)
        yield Case("selection", "float32", None, size + flags, partial(_all, launches))


def _all(launches: list[Callable[[], object]]) -> None:
    for launch in launches:
        launch()


def _ratio_loss() -> Iterator[Case]:
    for sequences, length, dual_clip in itertools.product((1, 8), (1024, 1 << 18), (None, 3.0)):
        tokens = [_empty(sequences, length) for _ in range(3)]
        selected = _empty(sequences, length, dtype=torch.bool)
        arguments: list[Any] = [*tokens, selected, _empty(sequences), 0.2, 0.28, dual_clip, 20.0]
        flags = (f"B={sequences}", f"L={length}", *("dual_clip",) * (dual_clip is not None))
        yield Case("ratio_loss", "float32", None, flags, partial(ratio_loss, *arguments))


def _support() -> Iterator[Case]:
    """Gradients in the dtype of the rows and in fp32; the bias's has one column."""
    count, pairs, vocabulary = 8192, 1 << 16, 32768
    index = _empty(pairs, dtype=torch.int64)
    for dtype, hidden in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (1, 100, 1024)
    ):
        rows, weight = (_empty(n, hidden, dtype=dtype) for n in (count, vocabulary))
        for flags in ((), ("keep",), ("add",), ("add", "fp32")):
            keep = _empty(pairs, dtype=torch.bool) if "keep" in flags else None
            out = weight.float() if "fp32" in flags else weight
            launches: list[Callable[[], object]] = [
                partial(pair_dots, rows, weight, index, index, keep),
                partial(pair_sums, _empty(pairs), rows, index, index, out, "add" in flags),
            ]
            name = (f"D={hidden}", *flags)
            yield Case("support", _name(dtype), None, name, partial(_all, launches))


def _entropy_from_logits() -> Iterator[Case]:
    for dtype, rows, columns, flags in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32),
        (1, 64),
        (151936, 50257),
        ((), ("temperature",)),
    ):
        temperature = _empty(rows) if flags else None
        launch = partial(entropy_from_logits, _empty(rows, columns, dtype=dtype), temperature)
        name = (f"R={rows}", f"V={columns}", *flags)
        yield Case("entropy_from_logits", _name(dtype), None, name, launch)
