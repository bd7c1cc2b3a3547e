"""Counts the instructions of a compiled kernel per step of its product, and per tile beside it.

A kernel's main loop walks over the depth D: it is the smallest loop that holds matrix instructions,
or, without any, most of the fused multiply-adds. What is executed once per tile is its epilogue:
the softmax's sums and the addresses of the next tile. It lies beside the main loop in the next
larger loop, or beside it in the program. Where two loops were flattened into one, it lies inside
the main loop behind a branch.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Instructions by the unit that executes them, of NVIDIA or of AMD. Products of fp32 have no matrix
# instructions.
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_")
FMA = re.compile(r"FFMA|v_(pk_)?fmac?_f32")
# Nothing, or of AMD's scalar unit, which works beside the others.
FREE = re.compile(r"NOP|s_")

# A label, or an instruction: its predicate, name and operands.
_LINE = re.compile(
    r"^(?P<label>\.L\w+):"
    r"|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>\w+)(?P<suffix>\S*)(?P<operands>[^;]*);"
    r"|^\t(?P<amd>[a-z]\w+)(?P<rest>.*)$",
    re.MULTILINE,
)
_TARGET = re.compile(r"\.L\w+")
_BRANCHES = re.compile(r"BRA$|s_c?branch")


class Counts(NamedTuple):
    """Instructions of one warp: in products, in special functions, and all others."""

    product: int
    special: int
    other: int

    @property
    def all(self) -> int:
        return sum(self)


class Kernel(NamedTuple):
    """Instructions per step of the main loop, and per tile outside of it."""

    step: Counts
    tile: Counts


class _Instruction(NamedTuple):
    """`address` and `target` count instructions."""

    address: int
    name: str
    suffix: str
    conditional: bool
    target: int | None


def count(text: str) -> Kernel:
    """The counts of a kernel, from the output of `nvdisasm -c`, or from AMD's assembly."""
    code = _instructions(text)
    loops = sorted(_loops(code), key=lambda loop: loop[1] - loop[0])
    matrix = _number(MATRIX, code) > 0
    product = MATRIX if matrix else FMA
    least = 1 if matrix else _number(FMA, code) // 2 + 1
    main = next(x for x in loops if _number(product, _within(code, x)) >= least)
    body = _within(code, main)
    behind = _behind_branches(body, product)
    step = [x for x in body if x.address not in behind]
    if _number(SPECIAL, step) < _number(SPECIAL, body):
        return Kernel(_counts(step, product), _counts(x for x in body if x.address in behind))
    around = next((x for x in loops if x[0] <= main[0] and x[1] >= main[1] and x != main), None)
    program = code if around is None else _within(code, around)
    inside = {x.address for x in body}
    return Kernel(_counts(body, product), _counts(x for x in program if x.address not in inside))


def count_without_options(text: str, exponentials: int) -> Kernel:
    """The same of a kernel that asks about its options as it runs, and is given none of them.

    exponentials: of a thread per tile; where a loop over parts of a tile has fewer, it is counted
        as often as it runs. Where products and sums have warps of their own, so has each its loop.
    """
    code = _instructions(text)
    loops = sorted(_loops(code), key=lambda loop: loop[1] - loop[0])
    main = next(x for x in loops if _number(MATRIX, _within(code, x)) > 0)
    behind = _options(code)
    sums = [x for x in code if x.address not in behind and x.suffix == ".EX2"]
    around = [x for x in loops if x[0] <= sums[0].address and x[1] >= sums[-1].address]
    inside = {x.address for x in _within(code, main)} | behind
    tile = [x for x in (_within(code, around[-1]) if around else code) if x.address not in inside]
    runs = -(-exponentials // len(sums))
    if runs > 1:
        tile += [x for x in _within(code, around[0]) if x.address not in inside] * (runs - 1)
    return Kernel(_counts(_within(code, main)), _counts(tile))


def _options(code: list[_Instruction]) -> set[int]:
    """Addresses that a forward branch leaves out, without products and sums of exponentials.

    Each tanh of a softcap has a reciprocal beside its exponential.
    """
    behind: set[int] = set()
    for x in code:
        if x.conditional and x.target is not None and x.address < x.target:
            left_out = code[x.address + 1 : x.target]
            named = [y.suffix for y in left_out]
            if not _number(MATRIX, left_out) and named.count(".EX2") <= named.count(".RCP"):
                behind.update(y.address for y in left_out)
    return behind


def count_of_values(text: str) -> Counts:
    """The same per tile of a kernel without products: in the loop of its exponentials, if any."""
    code = _instructions(text)
    loops = sorted(_loops(code), key=lambda loop: loop[1] - loop[0])
    bodies = (_within(code, loop) for loop in loops)
    most = _number(SPECIAL, code)
    return _counts(next((x for x in bodies if 2 * _number(SPECIAL, x) > most), code))


def _instructions(text: str) -> list[_Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str, bool]] = []
    for match in _LINE.finditer(text):
        if match["label"]:
            labels[match["label"]] = len(lines)
            continue
        name, operands = match["name"] or match["amd"], match["operands"] or match["rest"] or ""
        # BRA.U takes its predicate as an operand.
        conditional = match["predicate"] or re.match(r"\s*!?UP\d", operands) or "cbranch" in name
        lines.append((name, match["suffix"] or "", operands, bool(conditional)))
    code = []
    for address, (name, suffix, operands, conditional) in enumerate(lines):
        label = _TARGET.search(operands) if _BRANCHES.match(name) else None
        target = labels.get(label[0]) if label else None
        code.append(_Instruction(address, name, suffix, conditional, target))
    return code


def _loops(code: list[_Instruction]) -> Iterable[tuple[int, int]]:
    """First and last address of every backward branch's way; a trap branches to itself."""
    return {(x.target, x.address) for x in code if x.target is not None and x.target < x.address}


def _within(code: list[_Instruction], loop: tuple[int, int]) -> list[_Instruction]:
    return [x for x in code if loop[0] <= x.address <= loop[1]]


def _behind_branches(body: list[_Instruction], product: re.Pattern[str]) -> set[int]:
    """Addresses that a forward branch leaves out, without those of products."""
    behind: set[int] = set()
    last = body[-1].address
    for x in body:
        if x.conditional and x.target is not None and x.address < x.target <= last:
            left_out = [y for y in body if x.address < y.address < x.target]
            if not _number(product, left_out):
                behind.update(y.address for y in left_out)
    return behind


def _number(pattern: re.Pattern[str], code: Iterable[_Instruction]) -> int:
    return sum(bool(pattern.match(x.name)) for x in code)


def _counts(code: Iterable[_Instruction], product: re.Pattern[str] = MATRIX) -> Counts:
    code = [x for x in code if not FREE.match(x.name)]
    products, special = _number(product, code), _number(SPECIAL, code)
    return Counts(products, special, len(code) - products - special)
