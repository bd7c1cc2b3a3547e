"""The checker finds what has to be read twice, and README and docs have none of it."""

from pathlib import Path

import pytest

from tests import english

ROOT = Path(__file__).parents[1]
# A file or folder joins this list when it has no complaint left.
CLEAN = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs"),
    *("csrc", "entropy_kernels", "trainer", "benchmarks", "examples", "setup.py", "tests"),
    *("tools", "cmake"),
]


@pytest.mark.parametrize("path", CLEAN)
def test_prose_is_read_once(path):
    found = list(english.complaints(ROOT / path))
    assert not found, "\n".join(found)


def of(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return [line.partition(": ")[2] for line in english.complaints(path)]


LONG = " ".join(["word"] * 26)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (f"{LONG}.", 1),
        (f"- {LONG}\n- short\n", 1),
        (f"1. {LONG.replace('word', '`a word`')}\n", 1),
        (f"Of {LONG}.", 2),
        ("Short. " * 30, 0),
        (f"| {LONG} |\n", 0),
        (f"# {LONG}\n", 0),
        (f"```\n{LONG}\n```\n", 0),
        (f"    {LONG}\n", 0),
        (f"<!-- x:begin -->\n{LONG}\n<!-- x:end -->\n", 0),
        ("[" + "word " * 20 + "](https://a.b/c d e f g h i j k).", 0),
        ("It takes 4 bytes a token.", 1),
        ("One advantage per token, one a sequence.", 1),
        ("Of course a token is read once.", 0),
        ("It gives a token a row.", 0),
        ("None: that of the weights.", 1),
    ],
)
def test_markdown(tmp_path, text, count):
    assert len(of(tmp_path, "page.md", text)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('def f():\n    """Of the rows that have one."""\n', 1),
        ("# Of the rows:\n# those that have one.\nx = 1\n", 1),
        (f'def f():\n    """{LONG}."""\n', 1),
        (f'def _f():\n    """{LONG}."""\n', 0),
        (f'def f():\n    """Sum.\\n\\n    Args:\\n        a, b: {LONG}.\\n    """\n', 1),
        ('def f():\n    """Sum.\\n\\n    Args:\\n        a: Of the rows.\\n    """\n', 1),
        (f'class C:\n    x: int\n    """{LONG}."""\n', 1),
        (f'add("--x", help="{LONG}")\n', 1),
        ("x = 1  # 32 bytes a token\n", 1),
        (f'def f():\n    """z = {" + ".join(["a_1"] * 40)}."""\n', 0),
    ],
)
def test_python(tmp_path, source, count):
    assert len(of(tmp_path, "module.py", source)) == count


def test_cpp(tmp_path):
    source = "// Of the rows\n// that have one.\nint x;  // 4 bytes a token\nint y;  // Rows.\n"
    assert len(of(tmp_path, "code.h", source)) == 2
