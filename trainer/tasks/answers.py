"""Where the final answer of a response stands."""

import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` of `text` whose braces balance, or None."""
    start = text.rfind(_BOXED)
    while start >= 0:
        depth = 1
        begin = start + len(_BOXED)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
        start = text.rfind(_BOXED, 0, start)
    return None


def final_answer(response: str) -> str:
    r"""The answer of `response`, without surrounding blanks.

    It is the last `<answer>...</answer>`, else the last `\boxed{...}`, else the last line that is
    not blank. Answers of several lines, such as grids, need one of the first two.
    """
    tagged = _ANSWER.findall(response)
    if tagged:
        return tagged[-1].strip()
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    return response.strip().rpartition("\n")[2].strip()
