"""docs/architecture.md is the map: its tree and its prose name what is there, and all of it."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/[a-z]*/README.md")])
TREE = re.search(r"^```text\n(.*?)^```", TEXT, re.M | re.S)
# Every child of these is in the tree, and every folder below it.
MAPPED = (
    *("entropy_kernels", "entropy_kernels/_cuda_kernels", "trainer", "benchmarks", "cmake"),
    *("csrc", "csrc/cpu", "csrc/cuda", "tests/cuda"),
)
# Files that explain themselves, and folders of files that scripts write.
UNMAPPED = re.compile(r"/(__init__\.py|py\.typed|README\.md|\.[\w-]+)$|^benchmarks/results/.")


def tree_of(block: str) -> list[str]:
    """Paths of a tree: two blanks a level, a name, blanks, what it is. Folders end with a slash."""
    found, parents = [], list[str]()
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        found.append("".join(parents))
    return found


def names() -> list[str]:
    assert TREE is not None, "docs/architecture.md has no block ```text"
    return tree_of(TREE[1])


def tracked() -> set[str]:
    """Files that git knows or would add, and their folders, which end with a slash."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    files = [path for path in listed.splitlines() if (ROOT / path).is_file()]
    return {*files, *(f"{parent}/" for path in files for parent in Path(path).parents)}


def mapped(paths: set[str]) -> set[str]:
    """Those of `paths` that the tree has to have."""
    wanted = {
        path
        for path in paths
        if path.startswith(tuple(f"{folder}/" for folder in MAPPED))
        and (path.endswith("/") or str(Path(path).parent) in MAPPED)
    }
    return {path for path in wanted if not UNMAPPED.search(path)}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the files of a checkout")
def test_the_tree_is_what_there_is():
    there, shown = tracked(), set(names())
    gone, missing = sorted(shown - there), sorted(mapped(there) - shown)
    assert not gone + missing, f"in the tree and not there: {gone}; not in the tree: {missing}"


def test_no_name_stands_twice_and_each_says_what_it_is():
    assert len(names()) == len(set(names()))
    assert TREE is not None
    bare = [line for line in TREE[1].splitlines() if len(line.split()) < 2]
    assert not bare


def prose() -> str:
    assert TREE is not None
    return TEXT.replace(TREE[0], "")


def found(path: str) -> list[Path]:
    """Files of that path from the root, the package or _triton/; a bare name may lie anywhere."""
    if "/" not in path:
        return [ROOT / x for x in tracked() if Path(x).name == path]
    return [base / path for base in (ROOT, ROOT / "entropy_kernels") if (base / path).exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the files of a checkout")
def test_what_the_prose_names_is_there():
    paths = set(re.findall(r"`([\w./-]+(?:/|\.(?:py|h|cpp|cu|md)))`", prose()))
    paths = {path for path in paths if "NAME" not in path}
    assert len(paths) > 40
    gone = sorted(path for path in paths if not found(path))
    assert not gone, f"docs/architecture.md names what is not there: {gone}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_other_pages_name_are_there(page):
    """Paths in code spans; what lies in a folder of the reader's own is not ours to check."""
    named = set(re.findall(r"`([\w-]+/[\w./-]+\.(?:py|h|cpp|cu|md|sh|svg))`", page.read_text()))
    ours = {path for path in named if (ROOT / path.split("/")[0]).is_dir() and "NAME" not in path}
    gone = sorted(path for path in ours if not (ROOT / path).exists())
    assert not gone, f"{page.name} names what is not there: {gone}"


def test_a_name_is_in_the_file_that_is_said_to_have_it():
    """`NAME` (`path.py`), `NAME` of `path.py` and `NAME` in `path.py`."""
    pairs = re.findall(r"`(\w+)`\s(?:\(|of\s|in\s)`([\w/]+\.py)`", prose())
    assert len(pairs) > 8
    for name, path in pairs:
        files = found(path)
        assert files, path
        assert any(re.search(rf"\b{name}\b", file.read_text()) for file in files), (name, path)


def test_a_tree_is_read_by_its_indentation():
    block = "a/   x\n  b/  y\n    c.py  z\n  d.py  x\ne.py  w\n"
    assert tree_of(block) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.py"]
