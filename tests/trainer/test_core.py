"""The trainer's core: it is small and imports no annex, and no import leads back to itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE_LINES = 3350
ANNEXES = ("trainer.studies", "trainer.plan")
ENTRY = "trainer.__main__"  # its verbs import their commands, annexes among them, when they are run


def modules(folder: str) -> dict[str, Path]:
    """Every module below `folder` by its dotted name; a package is its __init__."""
    files = sorted((ROOT / folder).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    return dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, but for those of a type checker alone."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from statements(child)


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that the file at `path` imports."""
    found = set()
    for statement in statements(ast.parse(path.read_text())):
        for alias in statement.names:
            if isinstance(statement, ast.Import):
                found.add(alias.name)
            else:
                assert not statement.level, f"{path}: the trainer's imports are absolute"
                inner = f"{statement.module}.{alias.name}"
                found.add(inner if inner in known else str(statement.module))
    return found & known.keys()


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; none where there is no ring."""
    while ends := [name for name, found in graph.items() if not found & graph.keys()]:
        graph = {name: found for name, found in graph.items() if name not in ends}
    ring: list[str] = []
    place = next(iter(graph), None)
    while place is not None and place not in ring:
        ring.append(place)
        place = next(name for name in sorted(graph[place]) if name in graph)
    return ring[ring.index(place) :] if place is not None else []


@pytest.mark.parametrize("folder", ["trainer", "benchmarks"])
def test_imports_have_no_cycle(folder):
    known = modules(folder)
    ring = cycle({name: imported(path, known) - {name} for name, path in known.items()})
    assert not ring, f"{' -> '.join([*ring, ring[0]])}"


@pytest.mark.parametrize("annex", ANNEXES)
def test_nothing_else_imports_an_annex(annex):
    """Neither the core nor the other annex."""
    known = modules("trainer")
    bad = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imported(path, known)
        if other.startswith(annex) and not name.startswith((annex, ENTRY))
    ]
    assert not bad


def test_the_core_can_be_read_in_an_hour():
    lines = sum(len(p.read_text().splitlines()) for p in (ROOT / "trainer").glob("*.py"))
    assert lines <= CORE_LINES


def test_a_ring_and_what_leads_to_it_are_told_apart():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert cycle({"a": {"b", "d"}, "b": {"d"}, "d": set()}) == []
