"""How long a launch takes on a GPU: the longest of what its units have to do, from hardware.py.

A tile's product occupies a multiprocessor as long as its matrix units need at the sustained rate,
or as long as L2 needs to bring the operands. Its epilogue comes after it, unless another block of
the same multiprocessor or a second accumulator lets both run at a time. Then they only compete for
the slots in which instructions are issued.
"""

from functools import cache
from typing import NamedTuple

from benchmarks.gpu.costs import FLAGS, Cost, read
from benchmarks.gpu.hardware import (
    COPY,
    ISSUE,
    LAUNCH,
    LIBRARY_DEPTH,
    SCHEDULERS,
    SPECIAL,
    Gpu,
)
from benchmarks.gpu.launches import Launch

# Columns of tensor memory in a multiprocessor.
TENSOR_MEMORY = 512
# Tile of a library's product: with fewer tiles than multiprocessors some of them wait.
LIBRARY_TILE = 128


class Clocks(NamedTuple):
    """What one tile takes on one multiprocessor.

    product: of the matrix units at their peak.
    feed: in which L2 brings the operands.
    issue: of the main loop's instructions, at one per scheduler.
    epilogue_issue, epilogue_special: of the epilogue's instructions at that rate, and of its
        special functions.
    """

    product: float
    feed: float
    issue: float
    epilogue_issue: float
    epilogue_special: float

    @property
    def epilogue(self) -> float:
        return max(self.epilogue_issue / ISSUE, self.epilogue_special)

    @property
    def hidden(self) -> float:
        """The share of an epilogue for which one product leaves time at most, if both can run."""
        idle = (self.product - self.issue) / self.epilogue_issue
        return max(0.0, min(1.0, idle, self.product / self.epilogue_special))


def clocks(cost: Cost, depth: int, gpu: Gpu) -> Clocks:
    """What a tile takes whose product has this depth."""
    block_t, block_v, block_d = cost.blocks
    steps, threads = -(-depth // block_d), cost.warps * cost.lanes
    # Two multiprocessors of a cluster bring the weights together.
    brought = block_v / 2 if cost.variant == "cutlass" and gpu.architecture != "sm_80" else block_v
    return Clocks(
        2 * block_t * block_v * depth / gpu.tensor,
        2 * (block_t + brought) * depth / gpu.feed,
        cost.step.all * steps * threads / (SCHEDULERS * gpu.lanes),
        cost.tile.all * threads / (SCHEDULERS * gpu.lanes),
        cost.tile.special * threads / SPECIAL,
    )


def blocks(cost: Cost) -> int:
    """Blocks of a kernel that run on a multiprocessor at a time."""
    if cost.variant in ("tma", "tma_ws"):
        return 1
    by_tensor_memory = TENSOR_MEMORY // max(cost.tensor_memory, 1)
    return min(cost.fitting, by_tensor_memory)


def overlaps(cost: Cost) -> bool:
    """Whether an epilogue can run under a product."""
    return cost.accumulators > 1 or blocks(cost) > 1


def tile_clocks(cost: Cost, depth: int, gpu: Gpu) -> float:
    """Clocks per tile of a multiprocessor that always has the next one."""
    found = clocks(cost, depth, gpu)
    main = max(found.product / gpu.sustained, found.feed, found.issue / ISSUE)
    if overlaps(cost):
        return max(main, found.issue / ISSUE + found.epilogue)
    return main + found.epilogue


def seconds(launch: Launch, gpu: Gpu) -> float:
    """What one launch takes by itself."""
    at_least = launch.moved / (COPY * gpu.memory)
    if launch.product is not None:
        by_library = launch.constants is None
        at_least = max(at_least, _library(launch, gpu) if by_library else _ours(launch, gpu))
    return at_least + LAUNCH


def _library(launch: Launch, gpu: Gpu) -> float:
    assert launch.product is not None
    rows, columns, depth = launch.product
    tiles = -(-rows // LIBRARY_TILE) * -(-columns // LIBRARY_TILE) / gpu.processors
    waiting = -(-tiles // 1) / tiles
    return library(2 * rows * columns * depth, depth, gpu) * waiting


def library(flops: float, depth: int, gpu: Gpu) -> float:
    """Seconds of a library's product that fills the GPU."""
    return flops / (gpu.peak * gpu.sustained) * (1 + LIBRARY_DEPTH / depth)


def _ours(launch: Launch, gpu: Gpu) -> float:
    assert launch.product is not None
    cost, (rows, columns, depth) = cost_of(launch, gpu), launch.product
    assert launch.constants is not None
    block_t, block_v, _ = cost.blocks
    # A unit is what one program carries its sums through.
    carried = launch.constants.get("TILES", 1)
    units = -(-rows // block_t) * -(-columns // (block_v * carried))
    at_a_time = blocks(cost)
    waves = -(-units // (gpu.processors * at_a_time))
    total = waves * at_a_time * carried * tile_clocks(cost, depth, gpu)
    return total / (gpu.gigahertz * 1e9)


def cost_of(launch: Launch, gpu: Gpu) -> Cost:
    """The counts of a launch's kernel: of its tile with those flags, or the most similar ones."""
    given = launch.constants
    assert given is not None
    op, variant, _ = launch.kernel.split("_")
    if variant == "tma" and not given["FLATTEN"]:
        variant = "tma_ws" if given.get("WARP_SPECIALIZE") else "tma_split"
    row = given.get("BLOCK_T", given.get("BLOCK_C"))
    wanted = op, variant, "bf16", (row, given["BLOCK_V"], given["BLOCK_D"])
    flags = {flag for constant, flag in FLAGS.items() if given.get(constant)}
    same = [
        x
        for x in _costs()[gpu.architecture]
        if (x.op, x.variant, x.dtype, x.blocks) == wanted
        and x.warps == given.get("num_warps", x.warps)
        and x.stages == given.get("num_stages", x.stages)
    ]
    assert same, f"costs.json has no {wanted} for {gpu.architecture}"
    return min(same, key=lambda x: len(flags ^ set(x.flags)))


def of_cuda(gpu: Gpu) -> list[Cost]:
    """Those of csrc/cuda that are counted for this GPU, without options."""
    return [x for x in _costs()[gpu.architecture] if x.variant == "cutlass" and not x.flags]


@cache
def _costs() -> dict[str, list[Cost]]:
    return read()
