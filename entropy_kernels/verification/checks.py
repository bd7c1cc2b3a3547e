"""The check of one question: which cases decide it, and at which sizes.

T tokens, D hidden, V vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from .. import device as gpu
from .._triton.common.tiles import Tile
from .._triton.head_forward.launch import splits
from .head_cases import Case, Shape, compare, no_answer, stored_rows, twice
from .question import Question
from .token_cases import KINDS, ratio_loss_cases, selection_cases

# The kinds of rows, the most telling first.
FORWARD_ROWS = ("wide", "tied", "very negative", "large")
# Flags by their names among the options of the cases; "stored" is for forward alone.
NAMES = {
    "bias": "bias",
    "temperature": "temperatures",
    "softcap": "softcap",
    "statistics": "statistics",
    "keep_logits": "keep",
}
# Rows of a block of "cublas", whose own are few.
BLOCK_T = 32
# A call whose sizes are not known.
TOKENS, HIDDEN, VOCABULARY = 8191, 64, 151936


class Sizes(NamedTuple):
    """D, T and V of the call that asks; 0 where one is not known."""

    hidden: int = 0
    tokens: int = 0
    vocabulary: int = 0


def check(
    question: Question,
    where: torch.device,
    sizes: Sizes | None = None,
    forward: Tile | None = None,
) -> str | None:
    """Why the kernels of `question` are not right on a device; None where they are.

    It draws random numbers and computes under the settings that hold: `apart` keeps both from a
    caller.

    forward: the tile of the forward whose backward is asked about; None for the table's.

    Raises:
        torch.OutOfMemoryError: nothing is known then.
    """
    for case in cases(question, where, sizes or Sizes(), forward):
        if (reason := reason_of(case)) is not None:
            return f"{case.name}: {reason}"
    return None


def reason_of(case: Case) -> str | None:
    """Why a case fails, in one line; None where it passes."""
    try:
        case.run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first}"[:400]
    return None


def cases(
    question: Question, where: torch.device, sizes: Sizes, forward: Tile | None
) -> list[Case]:
    """What decides a question."""
    if question.op == "ratio_loss":
        return ratio_loss_cases("triton", where, small=True)
    if question.op == "selection":
        every = selection_cases("triton", where, small=gpu.interpreting())
        # The longest alone in the interpreter, which takes milliseconds per program.
        return every[-len(KINDS) :] if gpu.interpreting() else every
    is_forward = question.op == "forward"
    summing = question.tile if is_forward else forward
    shape, launch = _sizes(summing, question.tile, sizes, where)
    names = tuple(NAMES[flag] for flag in question.flags if flag in NAMES)
    stored = "stored" in question.flags
    found = _of_forward(shape, names, stored) if is_forward else _of_backward(shape, names, stored)
    tiles = (summing, None if is_forward else question.tile)
    return [
        Case(name, partial(run, tiles, question.dtype, where, *rest, **launch))
        for name, run, *rest in found
    ]


def _of_forward(shape: Shape, names: tuple[str, ...], stored: bool) -> list[tuple[Any, ...]]:
    names = (*names, "store") if stored else names
    ignored = (*names, "ignore")
    return [
        *((f"{rows} rows", compare, shape, rows, ignored, False) for rows in FORWARD_ROWS),
        ("rows without an answer", no_answer, shape, names),
        ("the same bits twice", twice, shape, ignored, False),
    ]


def _of_backward(shape: Shape, names: tuple[str, ...], stored: bool) -> list[tuple[Any, ...]]:
    ignored = (*names, "ignore")
    if stored:
        return [
            ("gradients of stored rows", stored_rows, shape, False, names),
            ("gradients of stored rows, bounded", stored_rows, shape, True, names),
        ]
    return [
        ("gradients of wide rows", compare, shape, "wide", ignored),
        ("gradients of log-prob alone", compare, shape, "large", (*ignored, "logprob alone")),
        ("the same bits twice, and bounds of rows", twice, shape, ignored),
    ]


def _sizes(
    summing: Tile | None, tile: Tile | None, sizes: Sizes, where: torch.device
) -> tuple[Shape, dict[str, Any]]:
    """Blocks and a tail of rows and of splits, with the caller's D and his columns per split.

    Kernels are compiled for the divisibility by 16 of T and V, too.
    """
    tokens, vocabulary = sizes.tokens or TOKENS, sizes.vocabulary or VOCABULARY
    tail_t, tail_v = 16 if tokens % 16 == 0 else 5, 16 if vocabulary % 16 == 0 else 13
    launch: dict[str, Any] = {}
    columns = 128
    if summing is not None:
        _, per_split = splits(summing, tokens, vocabulary, gpu.processors(where))
        launch, columns = {"per_split": per_split}, per_split * summing.block_v
    rows = BLOCK_T if tile is None or tile.variant == "cublas" else tile.block_t
    # About half of them have a gradient.
    blocks, vocabulary = 2 if tile is summing else 4, 2 * columns + tail_v
    # Backward takes two chunks of columns.
    launch |= {"orders": 0, "chunk_v": 16 * -(-vocabulary // 32)}
    return (blocks * rows + tail_t, sizes.hidden or HIDDEN, vocabulary), launch
