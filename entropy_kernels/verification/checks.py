"""The check of one question: which cases decide it, and at which sizes.

T tokens, D hidden, V vocabulary.
"""

import subprocess
from functools import partial
from typing import Any, NamedTuple

import torch

from .. import device as gpu
from .._triton.common.tiles import Tile
from .._triton.head_forward.launch import splits
from .head_cases import Case, compare, first_of_equals, no_answer, numbered, stored_rows, twice
from .head_runs import Shape
from .logit_cases import entropy_cases
from .pair_cases import support_cases
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
# Splits that take the kernel that merges them more than one step.
SPLITS = 17
# Rows of a block of "cublas", whose own are few.
BLOCK_T = 32
# A call whose sizes are not known.
TOKENS, HIDDEN, VOCABULARY = 8191, 64, 151936


class CannotCompileError(Exception):
    """Triton lacks what it compiles with: a compiler, a folder, room. No kernel is to blame."""


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
    thorough: bool = False,
) -> str | None:
    """Why the kernels of `question` are not right on a device; None where they are.

    It draws random numbers and computes under the settings that hold: `apart` keeps both from a
    caller.

    forward: the tile of the forward whose backward is asked about; None for the table's.
    thorough: with cases of kernels that are compiled for them alone, too long for a first use.

    Raises:
        torch.OutOfMemoryError, CannotCompileError: nothing is known then.
    """
    for case in cases(question, where, sizes or Sizes(), forward, thorough):
        if (reason := reason_of(case)) is not None:
            return f"{case.name}: {reason}"
    return None


def reason_of(case: Case) -> str | None:
    """Why a case fails, in one line; None where it passes.

    Raises:
        torch.OutOfMemoryError, CannotCompileError: nothing is known then.
    """
    try:
        case.run()
    except torch.OutOfMemoryError:
        raise
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotCompileError(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        if "C compiler" in str(error):  # Triton's, which builds its launchers with one
            raise CannotCompileError(str(error)) from error
        first, *_ = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first}"[:400]
    return None


def cases(
    question: Question, where: torch.device, sizes: Sizes, forward: Tile | None, thorough: bool
) -> list[Case]:
    """What decides a question."""
    impl = "cuda" if "cuda" in question.flags else "triton"
    if question.op == "ratio_loss":
        return ratio_loss_cases(impl, where, small=True)
    if question.op == "selection":
        every = selection_cases(impl, where, small=gpu.interpreting())
        # The longest alone in the interpreter, which takes milliseconds per program.
        return every[-len(KINDS) :] if gpu.interpreting() else every
    quick = gpu.interpreting() or not thorough
    if question.op == "support":
        return support_cases(question.dtype, where, small=gpu.interpreting(), quick=quick)
    if question.op == "entropy_from_logits":
        return entropy_cases(question.dtype, where, quick=quick)
    is_forward = question.op == "forward"
    summing = question.tile if is_forward else forward
    shape, launch = _sizes(summing, question.tile, sizes, where)
    names = tuple(NAMES[flag] for flag in question.flags if flag in NAMES)
    stored = "stored" in question.flags
    tiles = (summing, None if is_forward else question.tile)
    more: tuple[str, ...] = ("edges",)
    # What a call may have where tiles are read from pointers.
    if thorough and all(tile is None or tile.variant in ("pointer", "cublas") for tile in tiles):
        more += ("strided",)
    found = (_of_forward if is_forward else _of_backward)(shape, names, more, stored)
    found += [("rows are numbered", numbered)] * thorough
    each: list[Case] = [
        Case(name, partial(run, tiles, question.dtype, where, *rest, **launch))
        for name, run, *rest in found
    ]
    if thorough and is_forward and question.tile is not None and not stored:
        many, launch = _many_splits(question.tile, shape), launch | {"per_split": 1}
        run = partial(compare, tiles, question.dtype, where, many, "peaked", names, False)
        each.append(Case("many splits", partial(run, **launch)))
    return each


def _many_splits(tile: Tile, shape: Shape) -> Shape:
    """Few rows; "cublas" is compiled for any D."""
    hidden = HIDDEN if tile.variant == "cublas" else shape[1]
    return 6, hidden, SPLITS * tile.block_v


def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """With one temperature for all rows, which kernels are compiled for."""
    return tuple("temperature" if name == "temperatures" else name for name in names)


def _of_forward(
    shape: Shape, names: tuple[str, ...], more: tuple[str, ...], stored: bool
) -> list[tuple[Any, ...]]:
    names = (*names, "store") if stored else names
    ignored = (*names, "ignore")
    *rows_of_each, last = FORWARD_ROWS
    return [
        *((f"{rows} rows", compare, shape, rows, ignored, False) for rows in rows_of_each),
        (f"{last} rows", compare, shape, last, (*_shared(ignored), *more), False),
        ("rows without an answer", no_answer, shape, names),
        ("the same bits twice", twice, shape, ignored, False),
        *[("the first of equals", first_of_equals, shape, ignored)] * ("statistics" in names),
    ]


def _of_backward(
    shape: Shape, names: tuple[str, ...], more: tuple[str, ...], stored: bool
) -> list[tuple[Any, ...]]:
    ignored = (*names, "ignore")
    if stored:
        return [
            ("gradients of stored rows", stored_rows, shape, False, names),
            ("gradients of stored rows, bounded", stored_rows, shape, True, names),
        ]
    alone = (*_shared(ignored), *more, "logprob alone")
    return [
        ("gradients of wide rows", compare, shape, "wide", ignored),
        ("gradients of log-prob alone", compare, shape, "large", alone),
        ("the same bits twice, and bounds of rows", twice, shape, ignored),
    ]


def _sizes(
    summing: Tile | None, tile: Tile | None, sizes: Sizes, where: torch.device
) -> tuple[Shape, dict[str, Any]]:
    """Blocks and a tail of rows and of splits, with the caller's D and his columns per split.

    Logits and their gradient come in chunks, as they do in a large call. Kernels are compiled for
    the divisibility of V by 16, too.
    """
    tokens, vocabulary = sizes.tokens or TOKENS, sizes.vocabulary or VOCABULARY
    tail_t, tail_v = 5, 16 if vocabulary % 16 == 0 else 13
    launch: dict[str, Any] = {"orders": 0, "chunk_rows": BLOCK_T}
    columns = 128
    if summing is not None:
        _, per_split = splits(summing, tokens, vocabulary, gpu.processors(where))
        launch["per_split"], columns = per_split, per_split * summing.block_v
    rows = BLOCK_T if tile is None or tile.variant == "cublas" else tile.block_t
    # About half of them have a gradient.
    blocks = 2 if tile is summing else 3
    launch["chunk_v"] = columns
    return (blocks * rows + tail_t, sizes.hidden or HIDDEN, 2 * columns + tail_v), launch
