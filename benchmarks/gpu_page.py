"""Writes the tables of docs/gpu.md: what each GPU gets, by what is launched and its machine code.

python -m benchmarks.gpu_page [--check]    with --check it fails where the page is not current

All of it is predicted: benchmarks/gpu/predictions.py says from what.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from benchmarks.gpu import predictions
from benchmarks.gpu.costs import Cost
from benchmarks.gpu.hardware import GPUS, Gpu
from benchmarks.gpu.launches import Launch, Shape, backward_of, forward_of
from benchmarks.gpu.model import blocks, clocks, cost_of, of_cuda, overlaps, seconds
from benchmarks.predicted_tables import LABELS, TOKENS, predicted_ms
from benchmarks.report import between_markers
from benchmarks.tables import table

HIDDEN_HEADING = """### How much of the softmax is hidden

Instructions per logit are those of the epilogue, per thread, as counted in the machine code. The
first share is the epilogue's of a tile's clocks if nothing overlaps. The second is a bound: what
share of an epilogue one product leaves time to hide, 0 where a multiprocessor has one block."""
CUDA_HEADING = """### csrc/cuda beside Triton

Predicted milliseconds of Triton's kernels, then of those that `impl="cuda"` takes. A step is
forward and backward of 20% of the tokens, chosen by their entropies. On `sm_100` its backward is
Triton's."""
CUDA_TOKENS = (8192, 32768)
PATH = Path(__file__).parents[1] / "docs" / "gpu.md"
HIDDEN = (1024, 2048, 4096)
OPS: dict[str, Callable[[Shape], list[Launch]]] = {
    "forward": forward_of,
    "forward, statistics": partial(forward_of, statistics=True),
    "forward, softcap": partial(forward_of, softcap=True),
    "forward, logits kept": partial(forward_of, keep_logits=True),
    "dlogits of 20%": backward_of,
    "dlogits of 20%, entropy": partial(backward_of, entropy=True),
    "dlogits of 20%, softcap": partial(backward_of, softcap=True),
}
STEPS = ("eager", "compile", "trl", "triton-0.2", "triton-threshold", "triton-known")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = render()
    if parser.parse_args().check:
        stale = text != PATH.read_text()
        print("docs/gpu.md is not current; run python -m benchmarks.gpu_page" if stale else "")
        return int(stale)
    PATH.write_text(text)
    return 0


def render() -> str:
    """The page with its tables."""
    parts = [f"### {where.name} ({where.architecture})\n\n{_of(where)}" for where in GPUS]
    parts += [CUDA_HEADING, _cuda(), HIDDEN_HEADING, _hidden()]
    return between_markers(PATH, "\n\n".join(parts), "gpu")


def _of(where: Gpu) -> str:
    return f"{_tiles(where)}\n\n{_steps(where)}"


def _steps(where: Gpu) -> str:
    columns = ["predicted ms", *(f"D={hidden}" for hidden in HIDDEN)]
    rows = [
        [LABELS[name], *(predicted_ms(name, hidden, where) for hidden in HIDDEN)] for name in STEPS
    ]
    return table(columns, rows)


def _cuda() -> str:
    rows = []
    for where, tokens in itertools.product(filter(of_cuda, GPUS), CUDA_TOKENS):
        for name, way in {"forward": "forward", "step": "0.2"}.items():
            cells = (_both(way, tokens, hidden, where) for hidden in HIDDEN)
            rows.append([where.name, f"{tokens:,}", name, *cells])
    return table(["GPU", "tokens", "of", *(f"D={hidden}" for hidden in HIDDEN)], rows)


def _both(way: str, tokens: int, hidden: int, where: Gpu) -> str:
    names = f"triton-{way}", f"cuda-{way}"
    found = [predictions.milliseconds(name, tokens, hidden, where) for name in names]
    return ", ".join(f"{x:.3g}" for x in found if x is not None)


def _tiles(where: Gpu) -> str:
    """A row per op and tile; a tile that is not taken at a hidden size has no time there."""
    lines = [_line(name, where, tile) for name in OPS for tile in _tiles_of(name, where)]
    columns = ["tile", "registers", "shared KB", "blocks", *(f"D={hidden}" for hidden in HIDDEN)]
    return table(["predicted ms of", *columns], lines)


def _tiles_of(name: str, where: Gpu) -> list[str]:
    return list(dict.fromkeys(_tile(_launches(name, where, hidden), where) for hidden in HIDDEN))


def _line(name: str, where: Gpu, tile: str) -> list[str]:
    times, figures = [], ["", "", ""]
    for hidden in HIDDEN:
        found = _launches(name, where, hidden)
        if _tile(found, where) != tile:
            times.append("")
            continue
        times.append(f"{1e3 * sum(seconds(launch, where) for launch in found):.3g}")
        if (cost := _cost(found, where)) is not None:
            figures = [str(cost.registers), f"{cost.shared / 1024:.0f}", str(blocks(cost))]
    return [name, tile, *figures, *times]


@cache
def _launches(name: str, where: Gpu, hidden: int) -> list[Launch]:
    found = OPS[name](predictions.shape(where, TOKENS, hidden))
    return [x for x in found if x.kernel.startswith("dlogits")] if "dlogits" in name else found


def _tile(found: list[Launch], where: Gpu) -> str:
    cost = _cost(found, where)
    return "cuBLAS, then a pass" if cost is None else describe(cost)


def _cost(found: list[Launch], where: Gpu) -> Cost | None:
    own = [cost_of(x, where) for x in found if x.constants is not None]
    return own[0] if own else None


def describe(cost: Cost) -> str:
    sizes = "x".join(map(str, cost.blocks))
    return f"{cost.variant} {sizes}, {cost.warps} warps, {cost.stages} stages"


def _hidden() -> str:
    """For the tiles that the tables name: instructions per logit, and how much can be hidden."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for where, name, hidden in itertools.product(GPUS, OPS, HIDDEN):
        cost = _cost(_launches(name, where, hidden), where)
        if cost is not None:
            line = name, describe(cost), *_bounds(cost, where)
            found.setdefault(line, {})[where.architecture] = None
    for where in GPUS:
        for cost in of_cuda(where):
            line = f"{cost.op}, csrc/cuda", describe(cost), *_bounds(cost, where)
            found.setdefault(line, {})[where.architecture] = None
    columns = ["", "tile", "special", "other", *(f"D={hidden}" for hidden in HIDDEN), "on"]
    return table(columns, [[*line, ", ".join(archs)] for line, archs in found.items()])


def _bounds(cost: Cost, where: Gpu) -> list[str]:
    _, special, other = cost.per_element
    shares = []
    for hidden in HIDDEN:
        found = clocks(cost, hidden, where)
        serial = found.epilogue / (found.epilogue + found.product)
        hides = found.hidden if overlaps(cost) else 0.0
        shares.append(f"{serial:.0%}, {hides:.0%}")
    return [f"{special:.1f}", f"{other:.1f}", *shares]


if __name__ == "__main__":
    sys.exit(main())
