"""Writes costs.json: what every tile costs by its machine code, on GPUs that are not here.

python -m benchmarks.gpu.costs [ARCHITECTURE...]    compiles and counts, then writes the file
python -m benchmarks.gpu.costs --check ARCHITECTURE [WORD...]    counts again; says what differs
python -m benchmarks.gpu.costs --cuda [FILE...]    counts csrc/cuda's, in its module or in objects

A word is an op or a variant, and leaves out the others. It wants the pinned Triton, and a process
without TRITON_INTERPRET. The counts are of instructions of one warp, by benchmarks/gpu/assembly.py.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.assembly import Counts, count, count_of_values, count_without_options

PATH = Path(__file__).with_name("costs.json")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Kernels whose tiles are counted, and whether they multiply matrices.
KERNELS = {
    "forward_tma_kernel": True,
    "forward_pointer_kernel": True,
    "forward_cublas_kernel": False,
    "dlogits_tma_kernel": True,
    "dlogits_pointer_kernel": True,
    "dlogits_read_kernel": False,
}
# Constants of a kernel that are options of the head, or what is asked of it.
FLAGS = {
    "HAS_BIAS": "bias",
    "HAS_TEMPERATURE": "temperature",
    "HAS_SOFTCAP": "softcap",
    "STATISTICS": "statistics",
    "STORE_LOGITS": "keep_logits",
    "HAS_ENTROPY": "entropy",
    "HAS_FIRST": "stored",
    "NEEDS_BIAS": "bias_gradient",
}


# Options that are counted, one at a time, by op.
OPTIONS = {
    "forward": ("softcap", "statistics", "keep_logits"),
    "dlogits": ("softcap", "entropy", "stored", "keep_logits"),
}


class Cost(NamedTuple):
    """One compiled kernel.

    op, variant, dtype, flags, blocks, warps, stages: which it is. `blocks` are T, V and D of a
        step on one multiprocessor. The variant is the tile's, or "read" where dlogits reads stored
        logits. Warps that only bring operands are not counted.
    lanes: threads of a warp.
    registers, shared: per thread; bytes per block.
    fitting: blocks that a multiprocessor has room for, by both and by threads.
    tensor_memory: columns per block.
    accumulators: how many a block has, in tensor memory; 1 where they are in registers.
    step, tile: instructions of a warp in a step of the product, and per tile beside it.
    """

    op: str
    variant: str
    dtype: str
    flags: tuple[str, ...]
    blocks: tuple[int, int, int]
    warps: int
    stages: int
    lanes: int
    registers: int
    shared: int
    fitting: int
    tensor_memory: int
    accumulators: int
    step: Counts
    tile: Counts

    @property
    def identity(self) -> tuple[object, ...]:
        return self[:7]

    @property
    def per_element(self) -> tuple[float, ...]:
        """Instructions of the epilogue per logit and thread: products, special, other."""
        threads, elements = self.lanes * self.warps, self.blocks[0] * self.blocks[1]
        return tuple(x * threads / elements for x in self.tile)


def version() -> str:
    """The Triton that compiled what the file counts."""
    return json.loads(PATH.read_text())["triton"]


def read() -> dict[str, list[Cost]]:
    """The costs of each architecture."""
    found = json.loads(PATH.read_text())["costs"]
    return {arch: [_cost(line) for line in lines] for arch, lines in found.items()}


def _cost(line: list[Any]) -> Cost:
    cost = Cost(*line)
    return cost._replace(
        flags=tuple(cost.flags),
        blocks=tuple(cost.blocks),
        step=Counts(*cost.step),
        tile=Counts(*cost.tile),
    )


def counted(architecture: str, words: Iterable[str] = ()) -> list[Cost]:
    """The costs of the distinct kernels of the cases with at most one of OPTIONS.

    words: ops and variants; only cases that have them all are counted.
    """
    from tests.ahead_of_time import compiled
    from tests.compile_cases import cases

    found: dict[tuple[object, ...], Cost] = {}
    with compiled(architecture) as kernels:
        for case in cases():
            variant = "read" if case.tile is None else case.tile.variant
            if not _wanted(case.op, case.dtype, case.flags) or not {case.op, variant} >= {*words}:
                continue
            kernels.clear()
            case.launch()
            for kernel in kernels:
                if kernel.metadata.name in KERNELS:
                    cost = measured(kernel)
                    found.setdefault(cost.identity, cost)
    return sorted(found.values())


def _wanted(op: str, dtype: str, flags: tuple[str, ...]) -> bool:
    if op not in OPTIONS:
        return False
    if dtype == "bfloat16":
        return len(flags) <= 1 and set(flags) <= set(OPTIONS[op])
    return dtype == "float32" and not flags


def measured(kernel: Any) -> Cost:
    """The cost of Triton's CompiledKernel."""
    from tests.ahead_of_time import figures, sass

    name, metadata, code = kernel.metadata.name, kernel.metadata, kernel.asm
    text = sass(code["cubin"]) if "cubin" in code else code["amdgcn"]
    names, source, found = kernel.src.fn.arg_names, kernel.src, figures(kernel)
    constants = {names[place]: value for (place, *_), value in source.constants.items()}
    op, variant, _ = name.split("_")
    if variant == "tma" and not constants["FLATTEN"]:
        variant = "tma_ws" if constants.get("WARP_SPECIALIZE") else "tma_split"
    dtype = re.search(r"bf16|fp16|fp32", "".join(source.signature.values()))
    assert dtype is not None, f"{name} has no matrix"
    blocks = [constants.get(f"BLOCK_{axis}", constants.get("BLOCK_C")) for axis in "TVD"]
    step, tile = count(text) if KERNELS[name] else (Counts(0, 0, 0), count_of_values(text))
    return Cost(
        op,
        variant,
        dtype[0],
        tuple(flag for constant, flag in FLAGS.items() if constants.get(constant)),
        (blocks[0], blocks[1], blocks[2] if KERNELS[name] else 1),
        metadata.num_warps,
        metadata.num_stages,
        metadata.warp_size,
        found["registers"],
        found["shared"],
        found["blocks"],
        getattr(metadata, "tmem_size", None) or 0,
        2 if "ttng.tmem_alloc : () -> !ttg.memdesc<2x" in code["ttgir"] else 1,
        step,
        tile,
    )


def of_cuda(words: list[str]) -> dict[str, list[Cost]]:
    """The costs of csrc/cuda's kernels of the head, without options; words: files, or none."""
    from tests.cuda.machine_code import kernels, sources

    found: dict[str, list[Cost]] = {}
    for kernel in (kernel for path in sources(words) for kernel in kernels(path)):
        if kernel.tile is not None:
            architecture = kernel.architecture.removesuffix("a")
            found.setdefault(architecture, []).append(_cost_of_cuda(kernel))
    return found


def _cost_of_cuda(kernel: Any) -> Cost:
    """The cost of a Kernel of tests/cuda/machine_code.py."""
    rows, columns, depth, stages = kernel.tile
    pair, pingpong = kernel.architecture == "sm_100a", "Pingpong" in kernel.mangled
    # On sm_100 a thread has a row, and in turns two groups of warps have a tile each.
    rows, warps = (rows // 2, 4) if pair else (rows, 4 if pingpong else 8)
    step, tile = count_without_options(kernel.code, rows * columns // (32 * warps))
    return Cost(
        kernel.name,
        "cutlass",
        "bf16",
        ("statistics",) if kernel.statistics else (),
        (rows, columns, depth),
        warps,
        stages,
        32,
        kernel.registers,
        kernel.shared + kernel.operands,
        1,
        512 if pair else 0,
        2 if pair or pingpong else 1,
        step,
        tile,
    )


def text(costs: dict[str, list[Cost]], version: str) -> str:
    """costs.json: a line per kernel."""
    parts = []
    for arch, found in sorted(costs.items()):
        lines = ",\n".join(f"   {json.dumps(cost)}" for cost in found)
        parts.append(f'  "{arch}": [\n{lines}\n  ]')
    body = ",\n".join(parts)
    return f'{{\n "triton": "{version}",\n "costs": {{\n{body}\n }}\n}}\n'


def main() -> int:
    import triton

    parser = argparse.ArgumentParser("python -m benchmarks.gpu.costs", description=__doc__)
    parser.add_argument("words", nargs="*", help=f"{', '.join(ARCHITECTURES)}; with --check more")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    given = parser.parse_args()
    before = read() if PATH.exists() else {}
    if given.cuda:
        for architecture, found in of_cuda(given.words).items():
            kept = [x for x in before.get(architecture, []) if x.variant != "cutlass"]
            before[architecture] = sorted([*kept, *found])
        PATH.write_text(text(before, version()))
        return 0
    if not given.check:
        for architecture in given.words or ARCHITECTURES:
            kept = [x for x in before.get(architecture, []) if x.variant == "cutlass"]
            before[architecture] = sorted([*kept, *counted(architecture)])
            PATH.write_text(text(before, triton.__version__))
            print(f"{architecture}: {len(before[architecture])} kernels", flush=True)
        return 0
    architecture, *words = given.words
    known = {cost.identity: cost for cost in before[architecture]}
    stale = [x for x in counted(architecture, words) if known.get(x.identity) != x]
    for cost in stale:
        print(f"{architecture}: got {cost}, costs.json has {known.get(cost.identity)}")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
