"""Where the final answer of a response stands."""

import re

# A box with a brace, one without, and braces, of which `\{` and `\}` are none.
_MARKS = re.compile(
    r"(?P<open>\\(?:boxed|fbox)\s*\{)"
    r"|\\(?:boxed|fbox)(?![a-zA-Z{])\s*(?P<bare>-?\\(?!boxed|fbox)[a-zA-Z]+(?:\{[^{}]*\}|\s*\d)*"
    r"|[^\s{}$\\]+)"
    r"|\\[\\{}]|(?P<brace>[{}])"
)
_OPENED = re.compile(r"\\(?:boxed|fbox)\b|<answer>")
_TAG, _END_TAG = "<answer>", "</answer>"


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` of `text` that is closed, or None.

    `\boxed 34` has what follows it. One pass: a response may repeat `\boxed{` to the length limit.
    """
    opened: list[int | None] = []  # where the content of each open brace starts, if it is a box
    start, end = -1, -1
    for match in _MARKS.finditer(text):
        if match["bare"] is not None:
            start, end = match.span("bare")
        elif match["open"]:
            opened.append(match.end())
        elif match["brace"] == "{":
            opened.append(None)
        elif match["brace"] and opened:
            begin = opened.pop()
            if begin is not None and begin > start:
                start, end = begin, match.start()
    return text[start:end] if end >= 0 else None


def last_tagged(text: str) -> str | None:
    """Content of the last `<answer>...</answer>` of `text`, or None."""
    start = text.rfind(_TAG, 0, max(text.rfind(_END_TAG), 0))
    if start < 0:
        return None
    start += len(_TAG)
    return text[start : text.index(_END_TAG, start)]


def marked_answer(response: str) -> str | None:
    r"""The answer that `response` marks as such, without surrounding blanks, or None.

    It is the last `<answer>...</answer>`, wherever a box stands, else the last `\boxed{...}`; of a
    box within the tag, that box.
    """
    tagged = last_tagged(response)
    boxed = last_boxed(response if tagged is None else tagged)
    found = tagged if boxed is None else boxed
    return None if found is None else found.strip()


def is_cut(response: str) -> bool:
    """Whether `response` opens a box or a tag; without a marked answer it has closed none."""
    return _OPENED.search(response) is not None


def final_answer(response: str) -> str:
    """`marked_answer` of `response`, else its last line that is not blank.

    Answers of several lines, such as grids, need a mark.
    """
    found = marked_answer(response)
    return response.strip().rpartition("\n")[2].strip() if found is None else found
