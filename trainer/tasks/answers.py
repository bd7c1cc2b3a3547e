"""Where the final answer of a response stands."""

import re

_BRACES = re.compile(r"(\\boxed\{)|([{}])")
_TAG, _END_TAG = "<answer>", "</answer>"


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` of `text` whose braces balance, or None.

    One pass: a response may repeat `\boxed{` to the length limit.
    """
    opened: list[int | None] = []  # where the content of each open brace starts, if it is a box
    start, end = -1, -1
    for match in _BRACES.finditer(text):
        if match[2] != "}":
            opened.append(match.end() if match[1] else None)
        elif opened:
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


def final_answer(response: str) -> str:
    r"""The answer of `response`, without surrounding blanks.

    It is the last `<answer>...</answer>`, else the last `\boxed{...}`, else the last line that is
    not blank. Answers of several lines, such as grids, need one of the first two.
    """
    for found in (last_tagged(response), last_boxed(response)):
        if found is not None:
            return found.strip()
    return response.strip().rpartition("\n")[2].strip()
