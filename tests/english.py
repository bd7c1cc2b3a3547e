"""Prose that has to be read twice: long sentences, headless "Of ...", "one a token".

python -m tests.english PATH...    prints each complaint; a PATH is a file or a folder

Markdown is checked without code, tables, headings, generated blocks and the addresses of links.
Docstrings and comments of Python and comments of C++ are checked for phrases. Sentences are counted
in the docstrings of public functions, classes and fields. An item of a list begins a
sentence.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

LONGEST = 25
GENERATED = re.compile(
    r"<!-- (\w+):begin -->.*?<!-- \1:end -->|<!-- (\w+:\w+) -->.*?<!-- /\2 -->", re.S
)
DROPPED = re.compile(
    r"^(```|~~~).*?^\1|<!--.*?-->|<sub>.*?</sub>(?:<br>)?|!\[[^]]*\]\([^)]*\)", re.M | re.S
)
NOT_PROSE = re.compile(r"\s*(\||#|:::|---)| {4,}|\t")
ITEM = re.compile(r"^\s*([-*]|\d+\.) ")
ENTRY = re.compile(r"^  \*{0,2}[\w, ]+: ")  # of Args: and Raises:
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
# Line, text, and what counts as a word of it where its length is checked.
Prose = tuple[int, str, re.Pattern[str] | None]
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|etc|Dr|eq|Eq|cf|resp|al|Fig|No)\.$")
WORD = re.compile(r"\S*\w\S*")
# In a docstring neither a number nor a symbol of a formula is a word.
PLAIN_WORD = re.compile(r"(?<![\w.])[A-Za-z][A-Za-z'-]+(?!\w)")
END = re.compile(r"[.!?][)\"'*]*\s+")
HEADLESS = re.compile(r"(?:^|: )(?:Of (?!course)|None: (?:that|those) of )")
UNITS = r"""token|sequence|row|rank|step|response|group|second|seed|problem|prompt|parameter|place|
    micro-batch|update|layer|dtype|contestant|round|machine|run|head|GPU|word|chunk|GPU|call|page"""
ONES = "row|line|column|panel|number|value|range|table|field|entry|advantage|mask|mean|sum|seed"
A_TOKEN = re.compile(
    rf"(?<![\"'`])\b(?:one|once|twice|[\d.,]*\d|bytes|[KMG]B|flops|tokens|seconds|ms|hours|points"
    rf"|(?:a|an|one|each) (?:\w+ )?(?:{ONES})) an? (?:{''.join(UNITS.split())})\b"
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Print what is hard to read.")
    parser.add_argument("paths", nargs="+", type=Path)
    found = [line for path in parser.parse_args().paths for line in complaints(path)]
    print("\n".join([*found, f"{len(found)} complaints"]))
    return int(bool(found))


def complaints(path: Path) -> Iterator[str]:
    """A line for each phrase and each long sentence of a file, or of the files of a folder."""
    if path.is_dir():
        for inside in sorted(x for x in path.rglob("*") if x.suffix in READERS):
            yield from complaints(inside)
        return
    for line, text, word in READERS[path.suffix](path.read_text()):
        yield from (f"{path}:{line}: {problem}" for problem in problems(text, word))


def problems(text: str, word: re.Pattern[str] | None) -> Iterator[str]:
    """What is wrong with one paragraph."""
    if found := HEADLESS.search(text):
        yield f'headless "{text[found.start() :][:60]}"'
    for found in A_TOKEN.finditer(text):
        yield f'"{found[0]}": say "per {found[0].split()[-1]}"'
    for sentence in sentences(text) if word else ():
        count = len(word.findall(sentence))
        if count > LONGEST:
            yield f"{count} words: {sentence}"


def sentences(text: str) -> Iterator[str]:
    start = 0
    for end in END.finditer(text):
        if not ABBREVIATION.search(text[: end.start() + 1]):
            yield text[start : end.end()].strip()
            start = end.end()
    yield text[start:].strip()


def markdown_texts(page: str) -> Iterator[Prose]:
    """Each paragraph and each item of a list."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = DROPPED.sub(blank, GENERATED.sub(blank, page))
    yield from ((line, words, WORD) for line, words in paragraphs(text, ITEM))


def paragraphs(text: str, item: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each run of prose; code spans are one word, links their text."""
    start, lines = 0, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        ends = not line.strip() or NOT_PROSE.match(line)
        if (ends or item.match(line)) and lines:
            yield start, plain(" ".join(lines))
            lines = []
        if not ends:
            start = start if lines else number
            lines.append(item.sub("", line, count=1).strip())


def plain(text: str) -> str:
    return LINK.sub(r"\1", re.sub(r"`[^`]+`", "CODE", text))


def python_texts(source: str) -> Iterator[Prose]:
    """The same for docstrings, comments and help texts; None where no user reads it."""
    for node in ast.walk(ast.parse(source)):
        public = not (getattr(node, "name", "") or "").startswith("_")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and is_text(child.value):
                yield from docstring_texts(child, public and not isinstance(node, ast.Module))
        if isinstance(node, ast.keyword) and node.arg == "help" and is_text(node.value):
            yield node.value.lineno, plain(ast.literal_eval(node.value)), PLAIN_WORD
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from comments((t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT)


def cpp_texts(source: str) -> Iterator[Prose]:
    """The comments after //."""
    lines = (line.partition("//") for line in source.splitlines())
    yield from comments((n, text) for n, (_, found, text) in enumerate(lines, 1) if found)


def comments(lines: Iterable[tuple[int, str]]) -> Iterator[Prose]:
    """Comments on lines that follow one another are one text; its length is not checked."""
    text, start, last = "", 0, -1
    for number, line in lines:
        if number != last + 1:
            yield start, plain(text), None
            text, start = "", number
        text, last = f"{text} {line.lstrip('#/ ')}".strip(), number
    yield start, plain(text), None


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def docstring_texts(node: ast.Expr, lengths: bool) -> Iterator[Prose]:
    lines = ast.literal_eval(node.value).splitlines()
    margin = min((len(x) - len(x.lstrip()) for x in lines[1:] if x.strip()), default=0)
    flat, entries = [lines[0]] if lines else [], False
    for line in (x[margin:] for x in lines[1:]):
        if re.fullmatch(r"(Args|Raises|Returns|Yields|Attributes):", line):
            entries, line = True, ""
        elif line and not line.startswith(" "):
            entries = False
        flat.append(re.sub(r"^ {4,}", "  ", line) if entries else line)
    for line, text in paragraphs("\n".join(flat), re.compile(f"{ITEM.pattern}|{ENTRY.pattern}")):
        yield node.lineno + line - 1, text, PLAIN_WORD if lengths else None


READERS = {".md": markdown_texts, ".py": python_texts}
READERS |= dict.fromkeys((".h", ".cpp", ".cu"), cpp_texts)


if __name__ == "__main__":
    sys.exit(main())
