"""Reads the innermost loops of an object file from objdump's listing."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.installed import run

FUNCTION = re.compile(r"[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)")
# The branches of x86 and of aarch64.
BRANCH = re.compile(r"j\w+|call\w*|ret\w*|b|b\.\w+|bl|blr|br|cbn?z|tbn?z")
TARGET = re.compile(r"(?:.*, )?([0-9a-f]+) <")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    def __str__(self) -> str:
        return f"{self.name} {self.operands}".strip()


def innermost_loops(objdump: str, path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Yields a function's name and the instructions of a loop, from branch target to branch."""
    listing = run(objdump, "-d", "-C", "--no-show-raw-insn", path)
    function, seen = "", []
    for line in listing.splitlines():
        if named := FUNCTION.match(line):
            function, seen = named[1], []
        if not (found := INSTRUCTION.match(line)):
            continue
        seen.append(Instruction(int(found[1], 16), found[2], found[3]))
        if not BRANCH.fullmatch(found[2]):
            continue
        target = TARGET.match(found[3])
        if target and seen[0].address <= (first := int(target[1], 16)) < seen[-1].address:
            yield function, [one for one in seen if one.address >= first]
        seen = []
