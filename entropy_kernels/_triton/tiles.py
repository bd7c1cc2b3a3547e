"""Tiles of the kernels, by op, architecture, dtype and shape: a literal table, no autotuning.

TILES is rewritten by benchmarks/gpu/tune.py, which records in `source` the GPU and the date of
the measurement. "predicted" marks what was chosen without a GPU: ahead-of-time compilation shows
no spills, and the cost model prefers it.

T tokens (or R active rows), D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch

from entropy_kernels._triton import target


class Tile(NamedTuple):
    """How one kernel is launched.

    variant: which kernel. Of "forward": "pointer"; "tma", persistent with tensor descriptors;
        "tma_ws", the same warp-specialised; "tma_split", one program a vocabulary split;
        "cublas", chunks of torch.mm with fp32 output. Of "dlogits": "pointer" or "tma".
    block_t, block_v, block_d: rows, vocabulary and depth of one step.
    group_t: row tiles that take the same columns before the next columns come, so that a tile of
        the weight is read from L2 by all of them.
    split_v: columns whose statistics one program merges before it writes them, at most.
    source: who chose it.
    """

    variant: str
    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_t: int = 16
    split_v: int = 2048
    source: str = "predicted"


class Key(NamedTuple):
    """Ops are "forward" and "dlogits"; hidden and tokens are the largest the tile is meant for."""

    op: str
    architecture: str
    dtype: str
    hidden: int
    tokens: int


ANY = 1 << 62

TILES: dict[Key, Tile] = {
    Key("forward", "sm_80", "bfloat16", ANY, ANY): Tile("pointer", 128, 128, 64, 8, 3),
    Key("forward", "sm_86", "bfloat16", ANY, ANY): Tile("pointer", 128, 128, 32, 8, 3),
    Key("forward", "sm_90", "bfloat16", 2048, ANY): Tile("tma_split", 128, 128, 64, 4, 3),
    Key("forward", "sm_90", "bfloat16", ANY, ANY): Tile("tma", 128, 256, 64, 8, 3),
    Key("forward", "sm_100", "bfloat16", ANY, ANY): Tile("tma", 128, 256, 64, 8, 3),
    Key("forward", "gfx942", "bfloat16", ANY, ANY): Tile("pointer", 128, 128, 32, 8, 2),
    Key("forward", "any", "bfloat16", ANY, ANY): Tile("pointer", 64, 128, 32, 4, 3),
    Key("forward", "any", "float32", ANY, ANY): Tile("pointer", 64, 64, 32, 4, 2),
    Key("forward", "interpreter", "any", ANY, ANY): Tile("pointer", 32, 64, 32, 4, 1, 2, 128),
    Key("dlogits", "sm_80", "bfloat16", ANY, ANY): Tile("pointer", 128, 128, 64, 8, 3),
    Key("dlogits", "sm_86", "bfloat16", ANY, ANY): Tile("pointer", 128, 128, 32, 8, 3),
    Key("dlogits", "sm_90", "bfloat16", ANY, ANY): Tile("tma", 128, 256, 64, 8, 3),
    Key("dlogits", "sm_100", "bfloat16", ANY, ANY): Tile("tma", 128, 256, 64, 8, 3),
    Key("dlogits", "gfx942", "bfloat16", ANY, ANY): Tile("pointer", 128, 128, 32, 8, 2),
    Key("dlogits", "any", "bfloat16", ANY, ANY): Tile("pointer", 64, 128, 32, 4, 3),
    Key("dlogits", "any", "float32", ANY, ANY): Tile("pointer", 64, 64, 32, 4, 2),
    Key("dlogits", "interpreter", "any", ANY, ANY): Tile("pointer", 32, 64, 32, 4, 1, 2),
}

# Architectures without rows of their own, and whose they take.
_LIKE = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
}


def lookup(op: str, arch: str, dtype: torch.dtype, hidden: int, tokens: int) -> Tile:
    """The tile of the smallest shape in the table that holds this one.

    fp16 takes the rows of bf16. An unknown architecture takes tiles that fit everywhere.
    """
    name = "float32" if dtype == torch.float32 else "bfloat16"
    for candidate in (arch, _LIKE.get(arch), "any"):
        fitting = [
            key
            for key in TILES
            if (key.op, key.architecture) == (op, candidate)
            and key.dtype in (name, "any")
            and hidden <= key.hidden
            and tokens <= key.tokens
        ]
        if fitting:
            return TILES[min(fitting, key=lambda key: (key.hidden, key.tokens))]
    raise KeyError(f"no tile of {op!r} for {arch}, {name}, D={hidden}, T={tokens}")


def usable(tile: Tile, arch: str) -> Tile:
    """`tile`, or what this architecture and Triton's version can run instead of its variant."""
    if tile.variant == "tma_ws" and not target.has_warp_specialization(arch):
        return tile._replace(variant="tma", num_warps=2 * tile.num_warps)
    return tile
