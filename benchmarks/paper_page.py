"""docs/paper.md: its tables and figures from the files in benchmarks/results/paper/."""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import paper_findings as findings
from benchmarks import paper_tables as tables
from benchmarks.real_model import page as pretrained

PAGE = Path("docs/paper.md")
RESULTS = Path("benchmarks/results/paper")
_BLOCK = re.compile(r"(<!-- paper:(\w+) -->\n).*?(<!-- /paper:\2 -->)", re.DOTALL)

BLOCKS: dict[str, Callable[[Path], str]] = {
    "patterns": tables.patterns,
    "temperatures": tables.temperatures,
    "evolution": tables.evolution,
    "ablation": tables.ablation,
    "algorithms": tables.algorithms,
    "rules": tables.rules,
    "fractions": findings.fractions,
    "masks": findings.masks,
    "pretrained_patterns": lambda results: pretrained.patterns(_pretrained(results)),
    "pretrained_learning": lambda results: pretrained.learning(_pretrained(results)),
    "pretrained_temperatures": lambda results: pretrained.temperatures(_pretrained(results)),
    "pretrained_overlap": lambda results: pretrained.overlap(_pretrained(results)),
}


def write(root: Path, check: bool = False) -> int:
    """Write the page and its figures anew, or only compare; 1 where they were stale or failed."""
    stale = [path for path, text in render(root).items() if _differs(path, text)]
    if not check:
        for path, text in render(root).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return 0
    for path in stale:
        print(f"{path.relative_to(root)} is stale: python -m benchmarks.paper --render")
    return int(bool(stale))


def render(root: Path) -> dict[Path, str]:
    """The text of every file that is written."""
    page = root / PAGE
    drawn = tables.figures(root / RESULTS) | pretrained.figures(_pretrained(root / RESULTS))
    figures = {root / "docs" / "paper" / name: svg for name, svg in drawn.items()}
    return {page: fill(page.read_text(), root / RESULTS), **figures}


def fill(text: str, results: Path) -> str:
    """`text` with every block between its markers as the result files have it.

    Raises ValueError for a block of no known name, and for one that the page lacks.
    """
    found = [match.group(2) for match in _BLOCK.finditer(text)]
    if sorted(found) != sorted(BLOCKS):
        raise ValueError(f"docs/paper.md needs the blocks {', '.join(BLOCKS)}; it has {found}")

    def block(match: re.Match[str]) -> str:
        return f"{match.group(1)}{BLOCKS[match.group(2)](results)}\n{match.group(3)}"

    return _BLOCK.sub(block, text)


def _pretrained(results: Path) -> Path:
    """The folder of the results on a pretrained model, beside those of the small policies."""
    return results.with_name("real_model")


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text() != text
