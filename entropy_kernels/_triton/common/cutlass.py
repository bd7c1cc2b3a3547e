"""The tiles of csrc/cuda: the variant "cutlass", which impl="cuda" takes before Triton's kernels.

"auto" takes those alone whose `source` is a measurement; "predicted" marks the others, which no GPU
has run. A row of "selection" or "ratio_loss" says that csrc/cuda's kernels are the faster ones.

T tokens or active rows, D hidden.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ... import device
from ..._cuda_kernels import head
from ..._cuda_kernels.head import Block
from . import tiles
from .tiles import ANY, Key, Tile

VARIANT = "cutlass"
TILES: dict[Key, tuple[Tile, ...]] = {
    Key("forward", "sm_80", "bfloat16", ANY, ANY): (Tile(VARIANT, 128, 128, 64, 8, 3),),
    Key("forward", "sm_90", "bfloat16", 1024, ANY): (Tile(VARIANT, 128, 128, 64, 12, 7),),
    Key("forward", "sm_90", "bfloat16", ANY, ANY): (Tile(VARIANT, 128, 256, 64, 12, 4),),
    Key("forward", "sm_100", "bfloat16", ANY, ANY): (Tile(VARIANT, 256, 256, 64, 8, 7),),
    Key("dlogits", "sm_80", "bfloat16", ANY, ANY): (Tile(VARIANT, 128, 128, 64, 8, 3),),
    Key("dlogits", "sm_90", "bfloat16", 1024, ANY): (Tile(VARIANT, 128, 128, 64, 12, 7),),
    Key("dlogits", "sm_90", "bfloat16", ANY, ANY): (Tile(VARIANT, 128, 256, 64, 12, 4),),
}


def why_not(
    op: str, arch: str, dtype: torch.dtype, hidden: int, weight: Tensor | None = None
) -> str | None:
    """Why "forward" or "dlogits" has no such tile for D = hidden; None where it has one."""
    if (why := head.why_not(arch, dtype, hidden, weight)) is not None:
        return why
    have = sorted({key.architecture for key in TILES if key.op == op})
    if f"sm_{head.architecture(arch)}" not in have:
        return f"{op} must run on {' or '.join(have)}; got {arch}"
    return None


def variants(
    op: str, arch: str, dtype: torch.dtype, hidden: int, weight: Tensor | None = None
) -> set[str]:
    """The variant, where it can run, beside those of `tiles.variants`."""
    return {VARIANT} if why_not(op, arch, dtype, hidden, weight) is None else set()


def row(
    op: str, arch: str, dtype: torch.dtype, hidden: int, tokens: int, usable: Collection[str]
) -> tuple[Tile, ...]:
    """The tiles among `usable` variants in order of preference; none where it has none."""
    return tiles.find(op, f"sm_{head.architecture(arch)}", dtype, hidden, tokens, usable, TILES)


def block(where: torch.device, tile: Tile) -> Block:
    """What csrc/cuda calls the tile on a device whose architecture it has."""
    runs = head.architecture(device.architecture(where))
    assert runs is not None
    return Block(runs, tile.block_t, tile.block_v, tile.block_d)
