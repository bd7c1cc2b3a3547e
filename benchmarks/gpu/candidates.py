"""Tiles that are worth trying, by architecture: chosen by ahead-of-time compilation without spills.

At most a dozen per op: forty seconds have to hold them all. A warp-specialised program takes one
block of columns: a loop over blocks becomes an empty kernel there.
"""

import itertools

import torch

from entropy_kernels._triton.common import cutlass, tiles
from entropy_kernels._triton.common.tiles import Tile

HOPPER = (
    Tile("tma", 128, 256, 64, 8, 3),
    Tile("tma", 128, 256, 64, 8, 4),
    Tile("tma", 256, 128, 64, 8, 3),
    Tile("tma", 128, 128, 64, 8, 4),
    Tile("tma_split", 128, 128, 64, 4, 3),
    Tile("tma_split", 128, 128, 64, 8, 3, max_registers=128),
    Tile("tma_split", 128, 256, 64, 8, 3),
    Tile("tma_ws", 128, 256, 64, 4, 3, split_v=256),
    Tile("tma_ws", 128, 256, 64, 4, 4, split_v=256),
    Tile("pointer", 128, 128, 64, 8, 3),
    Tile("pointer", 128, 256, 64, 8, 3),
    Tile("cublas", 4, 1024, 1, 4, 1),
)
POINTERS = (
    Tile("pointer", 128, 128, 64, 8, 3),
    Tile("pointer", 128, 128, 32, 8, 3),
    Tile("pointer", 128, 128, 32, 8, 4),
    Tile("pointer", 128, 128, 32, 4, 4),
    Tile("pointer", 64, 128, 32, 4, 3),
    Tile("pointer", 64, 128, 64, 4, 4),
    Tile("cublas", 4, 1024, 1, 4, 1),
)
AMD = (
    Tile("pointer", 128, 128, 32, 8, 2),
    Tile("pointer", 128, 128, 64, 8, 2),
    Tile("pointer", 256, 128, 32, 8, 2),
    Tile("pointer", 64, 128, 64, 4, 2),
)
INTERPRETER = (
    Tile("pointer", 32, 64, 32, 4, 1, 2, 128),
    Tile("tma", 32, 64, 32, 4, 1, 2, 128),
    Tile("tma_split", 32, 64, 32, 4, 1, 2, 128),
    Tile("cublas", 4, 64, 1, 4, 1, 1, 128),
)
# What computes dlogits.
DLOGITS_VARIANTS = ("tma", "pointer")


def forward(arch: str) -> tuple[Tile, ...]:
    """To try on this architecture."""
    if arch == "interpreter":
        return INTERPRETER
    if not arch.startswith("sm_"):
        return AMD
    # From sm_120 on GPUs are consumers' again: 99 KB of shared memory, no asynchronous products.
    found = HOPPER if 90 <= int(arch.removeprefix("sm_")) < 120 else POINTERS
    return tuple(tile for tile in found if tile.variant in tiles.variants(arch))


def dlogits(arch: str) -> tuple[Tile, ...]:
    return tuple(tile for tile in forward(arch) if tile.variant in DLOGITS_VARIANTS)


def forward_store(arch: str) -> tuple[Tile, ...]:
    """One a variant: whether it pays to store logits, which "cublas" does, depends on that."""
    return tuple(_one_a_variant(forward(arch)))


def pairs(arch: str, quick: bool) -> list[tuple[Tile | None, Tile | None]]:
    """(forward, dlogits) for correctness: the table's own choice, then one tile a variant.

    The tuner checks every other tile on its own before it is timed. Those of csrc/cuda are all
    here.
    """
    found: list[tuple[Tile | None, Tile | None]] = [(None, None)]
    gradients = _one_a_variant(dlogits(arch))
    for number, tile in enumerate(_one_a_variant(forward(arch))):
        found.append((tile, gradients[number % len(gradients)]))
    of_dlogits = itertools.cycle(_of_csrc("dlogits", arch) or [None])
    found += zip(_of_csrc("forward", arch), of_dlogits, strict=False)
    return found[1:3] if quick else found


def name(tile: Tile | None) -> str:
    """Short, and unique among the candidates."""
    if tile is None:
        return "the table's"
    blocks = f"{tile.block_t}x{tile.block_v}x{tile.block_d}"
    return f"{tile.variant} {blocks} w{tile.num_warps} s{tile.num_stages} g{tile.group_t}"


def _of_csrc(op: str, arch: str) -> list[Tile]:
    """The tiles of every hidden size; none where no kernel of csrc/cuda was built for it."""
    found: list[Tile] = []
    for hidden in (1024, tiles.ANY):
        usable = cutlass.variants(op, arch, torch.bfloat16, 1024)
        found += cutlass.row(op, arch, torch.bfloat16, hidden, tiles.ANY, usable)
    return list(dict.fromkeys(found))


def _one_a_variant(found: tuple[Tile, ...]) -> list[Tile]:
    first: dict[str, Tile] = {}
    for tile in found:
        first.setdefault(tile.variant, tile)
    return list(first.values())
