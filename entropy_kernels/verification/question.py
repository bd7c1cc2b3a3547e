"""What is asked about a kernel before "auto" takes it, and the text that the record keeps it by."""

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .._triton.common.tiles import Tile
from ..head import Head

OPS = ("forward", "dlogits", "ratio_loss", "selection", "support", "entropy_from_logits")
# Options of a call that its forward or its backward is compiled for, in the order of the texts.
FLAGS = {
    "forward": ("bias", "temperature", "softcap", "statistics", "keep_logits", "stored", "odd V"),
    "dlogits": ("bias", "temperature", "softcap", "keep_logits", "stored", "odd V"),
}


class Question(NamedTuple):
    """Whether the kernels of one op compute rightly, compiled for one dtype, tile and flags.

    op: one of OPS; all but forward and dlogits are one question each, without tile. Of ratio_loss
        and selection "cuda" is the flag of csrc/cuda's. "support" is both products of pairs.
    tile: None too where a backward reads all logits.
    flags: options of the call out of FLAGS; "odd V" and "odd D" where one is no multiple of 16, for
        which Triton compiles other code; "ragged" where a block of depth reaches beyond D. Numbers
        of tokens, active rows and splits change no code.
    """

    op: str
    dtype: torch.dtype
    tile: Tile | None = None
    flags: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The same for the same question, whoever measured the tile."""
        words = [self.op, str(self.dtype).removeprefix("torch.")]
        if self.tile is not None:
            fields = self.tile._replace(source="")._asdict()
            words += [str(x) for x in fields.values() if x != ""]
        return " ".join([*words, *self.flags])


def ask(
    op: str, dtype: torch.dtype, hidden: int, options: Iterable[str], tile: Tile | None
) -> Question:
    """The question about one tile of a call of the head with D = hidden and these options."""
    flags = [name for name in FLAGS[op] if name in options]
    if tile is not None and tile.variant != "cublas" and hidden % tile.block_d:
        flags.append("ragged")
    flags += ["odd D"] * (hidden % 16 != 0)
    return Question(op, dtype, tile, tuple(flags))


class Call(NamedTuple):
    """A call of the head, in numbers and names that are constants to torch.compile.

    hidden, tokens, vocabulary: D, T and V; T is 0 where it may be dynamic.
    """

    dtype: torch.dtype
    hidden: int
    options: tuple[str, ...]
    tokens: int
    vocabulary: int


def call_of(head: Head, *, keep_logits: bool, stored: bool, statistics: bool) -> Call:
    """The call of a flat head, whose gradients are wanted where autograd would ask for them.

    Its options are those of `options_of`; "gradient"; and "strided hidden" and "strided weight" for
    matrices that tensor descriptors do not fit.
    """
    gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (head.hidden, head.weight, head.bias)
    )
    options = options_of(
        head, keep_logits=keep_logits, stored=stored and gradient, statistics=statistics
    )
    options += ("gradient",) * gradient
    for name, matrix in (("hidden", head.hidden), ("weight", head.weight)):
        options += (f"strided {name}",) * (not _fits_descriptor(matrix))
    tokens = 0 if torch.compiler.is_compiling() else head.hidden.shape[0]
    hidden, vocabulary = (operator.index(n) for n in (head.hidden.shape[1], head.weight.shape[0]))
    return Call(head.hidden.dtype, hidden, options, tokens, vocabulary)


def options_of(
    head: Head, *, keep_logits: bool = False, stored: bool = False, statistics: bool = False
) -> tuple[str, ...]:
    """The options of a flat head's launches, by the names of FLAGS."""
    there = {
        "bias": head.bias is not None,
        "temperature": head.temperature is not None,
        "softcap": head.softcap is not None,
        "statistics": statistics,
        "keep_logits": keep_logits,
        "stored": stored,
        "odd V": operator.index(head.weight.shape[0]) % 16 != 0,
    }
    return tuple(name for name in there if there[name])


def _fits_descriptor(matrix: Tensor) -> bool:
    """As the table of tiles has it, by numbers that torch.compile knows."""
    size, row = matrix.element_size(), matrix.stride(0)
    offset = 0 if torch.compiler.is_compiling() else matrix.storage_offset()
    aligned = row * size % 16 == 0 and offset * size % 16 == 0
    return matrix.stride(1) == 1 and row > 0 and aligned
