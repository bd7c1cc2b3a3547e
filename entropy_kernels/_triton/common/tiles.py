"""Tiles of the kernels, by op, architecture, dtype and shape: a literal table, no autotuning.

benchmarks/gpu/tune.py proposes TILES anew and records the GPU and the date of the measurement in
`source`. "predicted" marks tiles that were chosen without a GPU: ahead-of-time compilation shows
no spills, and the cost model prefers them.

T tokens or active rows, D hidden, V vocabulary.
"""

import itertools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import device


class Tile(NamedTuple):
    """How one kernel is launched.

    variant: which kernel runs. "pointer" reads plain pointers. "tma" is persistent and reads tensor
        descriptors; "tma_split" does so with one program per vocabulary split, "tma_ws" with
        specialised warps. "cublas", in "forward" alone, reads chunks of torch.mm in fp32, so that
        it has whole rows of logits at hand. "cutlass" is csrc/cuda's (cutlass.py).
    block_t, block_v, block_d: rows, vocabulary and depth of one step.
    group_t: blocks of rows that take the same columns in turn: L2 then has their weights.
    split_v: columns whose sums one program merges before it writes them, at most.
    max_registers: of a thread, on GPUs of NVIDIA, up to 255. 0 leaves them to the compiler, which
        may rather spill a few than keep one more program from a multiprocessor.
    source: the GPU and the date of the measurement that chose the tile.
    """

    variant: str
    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_t: int = 16
    split_v: int = 2048
    max_registers: int = 0
    source: str = "predicted"

    @property
    def options(self) -> dict[str, Any]:
        """What Triton takes beside a kernel's arguments. From 3.10 on it fuses only if told to."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.max_registers:
            options["maxnreg"] = self.max_registers
        return options


class Key(NamedTuple):
    """What a tile is for; hidden and tokens are the largest sizes.

    op: "forward" or "dlogits". "forward_keep" stores the logits of all rows, and "forward_store",
        where "cublas" comes first, those of rows above a threshold. "_statistics" sums more per
        row. Each may end in "_softcap": a tanh per element needs registers of its own. Without an
        entry of its own, an op takes that of a plainer one.
    """

    op: str
    architecture: str
    dtype: str
    hidden: int
    tokens: int


ANY = 1 << 62
TMA = ("tma", "tma_split", "tma_ws")

# Where dlogits reads logits that were stored, and multiplies nothing.
READ = Tile("pointer", 16, 128, 1, 8, 1, max_registers=128)

# The tiles of each key in order of preference: the first one that can run is taken. In fp32
# "cublas" does not come first: backward recomputes logits in the pointer kernel's order of
# summation. In a row that is nearly certain, their difference from forward's has few digits.
#
# Predictions behind the order, at 8192 tokens, V = 151936, D = 4096, in milliseconds:
# - sm_90 keeps the logits of a fifth of the rows: step 10.0 with "cublas", 11.5 with "pointer".
#   sm_86 (RTX 4090), forward alone: 14 by "cublas" and 18 by "pointer"; even at D = 1024.
# - sm_100: forward 7.6 by "cublas", 10 to 17 by tiles of 128 x 128, which cannot feed its tensor
#   cores. Below D = 2048 the traffic of logits is what costs.
# - sm_90, D <= 1024: two programs of "tma_split" with four warps share a multiprocessor: one
#   multiplies while the other sums. With eight warps they need at most 128 registers each, which
#   spills where T or V is odd. At D = 2048 the larger tile of "tma" pays: 7.9 against 9.2.
# - sm_90, softcap: two programs of "pointer" share a multiprocessor: 18.4 against 21.1 by "tma",
#   and 4.6 against 7.3 at D = 1024.
# - sm_100, dlogits with softcap: "tma" of 128 x 128 spills with all options where V is odd.
#   Without a spill it would take 2.1 at 20% of the tokens, and the smaller tile takes 3.6.
TILES: dict[Key, tuple[Tile, ...]] = {
    Key("forward", "sm_80", "bfloat16", ANY, ANY): (
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward", "sm_86", "bfloat16", ANY, ANY): (
        Tile("pointer", 128, 128, 32, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_statistics", "sm_86", "bfloat16", ANY, ANY): (
        Tile("pointer", 64, 128, 32, 8, 3, max_registers=255),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
    ),
    Key("forward", "sm_90", "bfloat16", 1024, ANY): (
        Tile("tma_split", 128, 128, 64, 4, 3),
        Tile("tma_ws", 128, 256, 64, 4, 3),
        Tile("tma", 128, 256, 64, 8, 3),
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward", "sm_90", "bfloat16", ANY, ANY): (
        Tile("tma", 128, 256, 64, 8, 4),
        Tile("tma_ws", 128, 256, 64, 4, 3),
        Tile("tma_split", 128, 128, 64, 4, 3),
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward", "sm_100", "bfloat16", 2047, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward", "sm_100", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 128, 128, 64, 8, 3),
    ),
    Key("forward_softcap", "sm_90", "bfloat16", ANY, ANY): (
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("tma_ws", 128, 128, 64, 4, 4),
        Tile("tma_split", 128, 128, 64, 8, 4),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_softcap", "sm_100", "bfloat16", 2047, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_softcap", "sm_100", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 128, 128, 64, 8, 3),
    ),
    Key("forward_statistics", "sm_80", "bfloat16", ANY, ANY): (
        Tile("pointer", 64, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
    ),
    Key("forward_statistics", "sm_90", "bfloat16", ANY, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("tma_split", 128, 128, 64, 8, 4),
        Tile("pointer", 64, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
    ),
    Key("forward_statistics", "sm_100", "bfloat16", 2047, ANY): (
        Tile("tma", 128, 64, 64, 8, 4),
        Tile("tma_split", 128, 64, 64, 8, 4),
        Tile("pointer", 128, 64, 64, 8, 3, max_registers=144),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
    ),
    Key("forward_statistics", "sm_100", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
        Tile("tma", 128, 64, 64, 8, 4),
        Tile("tma_split", 128, 64, 64, 8, 4),
        Tile("pointer", 128, 64, 64, 8, 3, max_registers=144),
    ),
    Key("forward_keep", "sm_80", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
        Tile("pointer", 64, 128, 64, 8, 3),
    ),
    Key("forward_keep", "sm_86", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
        Tile("pointer", 64, 128, 32, 8, 3, max_registers=255),
    ),
    Key("forward_keep", "sm_90", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
        Tile("pointer", 64, 128, 64, 8, 3),
    ),
    Key("forward_keep", "sm_100", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
        Tile("pointer", 128, 128, 64, 8, 3),
    ),
    Key("forward", "gfx942", "bfloat16", ANY, ANY): (
        Tile("pointer", 128, 128, 32, 8, 2),
        Tile("cublas", 4, 1024, 1, 4, 1),
    ),
    Key("forward", "any", "bfloat16", ANY, ANY): (
        Tile("pointer", 64, 128, 32, 4, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
    ),
    Key("forward", "any", "float32", ANY, ANY): (
        Tile("pointer", 64, 64, 16, 4, 2),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_statistics", "any", "float32", ANY, ANY): (
        Tile("pointer", 32, 64, 16, 4, 2, max_registers=168),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=255),
    ),
    Key("forward", "interpreter", "any", ANY, ANY): (
        Tile("pointer", 32, 64, 32, 4, 1, 2, 128),
        Tile("tma", 32, 64, 32, 4, 1, 2, 128),
        Tile("tma_split", 32, 64, 32, 4, 1, 2, 128),
        Tile("cublas", 32, 64, 1, 4, 1, 1, 128),
    ),
    Key("forward_store", "sm_80", "bfloat16", 1024, ANY): (
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_store", "sm_80", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
        Tile("pointer", 128, 128, 64, 8, 3),
    ),
    Key("forward_store", "sm_90", "bfloat16", 1024, ANY): (
        Tile("tma_split", 128, 128, 64, 4, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_store", "sm_90", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
        Tile("tma", 128, 256, 64, 8, 4),
    ),
    Key("forward_store", "sm_100", "bfloat16", 1024, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_store", "sm_100", "bfloat16", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
        Tile("tma", 128, 128, 64, 8, 4),
    ),
    Key("forward_store", "any", "bfloat16", ANY, ANY): (
        Tile("pointer", 64, 128, 32, 4, 3),
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
    ),
    Key("forward_store", "any", "float32", ANY, ANY): (
        Tile("cublas", 4, 1024, 1, 4, 1, max_registers=128),
        Tile("pointer", 64, 64, 16, 4, 2),
    ),
    Key("forward_store", "interpreter", "any", ANY, ANY): (
        Tile("cublas", 32, 64, 1, 4, 1, 1, 128),
    ),
    Key("dlogits", "sm_80", "bfloat16", ANY, ANY): (Tile("pointer", 128, 128, 64, 8, 3),),
    Key("dlogits", "sm_86", "bfloat16", ANY, ANY): (Tile("pointer", 128, 128, 32, 8, 3),),
    Key("dlogits", "sm_90", "bfloat16", ANY, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 128, 128, 64, 8, 3),
    ),
    Key("dlogits", "sm_100", "bfloat16", ANY, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 128, 128, 64, 8, 3),
    ),
    Key("dlogits_softcap", "sm_80", "bfloat16", ANY, ANY): (Tile("pointer", 64, 128, 64, 8, 3),),
    Key("dlogits_softcap", "sm_86", "bfloat16", ANY, ANY): (Tile("pointer", 64, 128, 32, 8, 3),),
    Key("dlogits_softcap", "sm_90", "bfloat16", ANY, ANY): (
        Tile("tma", 128, 128, 64, 8, 4),
        Tile("pointer", 64, 128, 64, 8, 3),
    ),
    Key("dlogits_softcap", "sm_100", "bfloat16", ANY, ANY): (
        Tile("tma", 128, 64, 64, 8, 4),
        Tile("pointer", 128, 64, 64, 8, 3),
    ),
    Key("dlogits", "gfx942", "bfloat16", ANY, ANY): (Tile("pointer", 128, 128, 32, 8, 2),),
    Key("dlogits", "any", "bfloat16", ANY, ANY): (Tile("pointer", 64, 128, 32, 4, 3),),
    Key("dlogits", "any", "float32", ANY, ANY): (Tile("pointer", 64, 64, 32, 4, 2),),
    Key("dlogits", "interpreter", "any", ANY, ANY): (
        Tile("pointer", 32, 64, 32, 4, 1, 2),
        Tile("tma", 32, 64, 32, 4, 1, 2),
    ),
}

# Architectures without tiles of their own, and those whose tiles they take.
_LIKE = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
}


def variants(arch: str, *matrices: Tensor) -> set[str]:
    """The variants that can run on these matrices. Descriptors need dense rows of aligned 16 B."""
    names = {"pointer", "cublas"}
    if device.has_tma(arch) and all(map(_fits_descriptor, matrices)):
        names |= {"tma", "tma_split"}
        if device.has_warp_specialization(arch):
            names.add("tma_ws")
    return names


def _fits_descriptor(matrix: Tensor) -> bool:
    row_bytes = matrix.stride(0) * matrix.element_size()
    aligned = row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0
    return matrix.stride(1) == 1 and row_bytes > 0 and aligned


def row(
    op: str, arch: str, dtype: torch.dtype, hidden: int, tokens: int, variants: Collection[str]
) -> tuple[Tile, ...]:
    """The tiles among `variants` in order of preference, of the smallest shape that holds this one.

    op may have several endings, such as "_statistics_softcap". fp16 takes the tiles of bf16. An
    unknown architecture takes tiles that fit everywhere.
    """
    if found := find(op, arch, dtype, hidden, tokens, variants, TILES):
        return found
    raise ValueError(f"no tile of {op!r} for {arch}, {dtype}, D={hidden}, T={tokens}, {variants}")


def find(
    op: str,
    arch: str,
    dtype: torch.dtype,
    hidden: int,
    tokens: int,
    variants: Collection[str],
    table: dict[Key, tuple[Tile, ...]],
) -> tuple[Tile, ...]:
    """The same in any table; nothing where it has none."""
    name = "float32" if dtype == torch.float32 else "bfloat16"
    for candidate in itertools.product((arch, _LIKE.get(arch), "any"), _plainer(op)):
        fitting = [
            key
            for key in table
            if (key.architecture, key.op) == candidate
            and key.dtype in (name, "any")
            and hidden <= key.hidden
            and tokens <= key.tokens
        ]
        for key in sorted(fitting, key=lambda key: (key.hidden, key.tokens)):
            if found := tuple(on(arch, tile) for tile in table[key] if tile.variant in variants):
                return found
    return ()


def on(arch: str, tile: Tile) -> Tile:
    """The tile as this architecture takes it: only NVIDIA's compiler knows a bound of registers."""
    return tile if arch.startswith("sm_") else tile._replace(max_registers=0)


def _plainer(op: str) -> Iterator[str]:
    """The op, then with fewer and fewer of its endings, the last ones dropped first."""
    name, *endings = op.split("_")
    for number in range(len(endings), -1, -1):
        for kept in itertools.combinations(endings, number):
            yield "_".join((name, *kept))
