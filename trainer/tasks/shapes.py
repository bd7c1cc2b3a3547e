r"""What an answer is made of: lists, sets, tuples, intervals, matrices, relations, names.

Texts are in the one spelling of `trainer.tasks.spelling`.
"""

import re
from dataclasses import dataclass

_OPEN, _CLOSE = "([{", ")]}"
_TOKENS = re.compile(r"\\(?:le|ge|ne|cup|in|approx|pm|mp)(?![a-zA-Z])|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_RELATIONS = ("<", ">", "\\le", "\\ge", "\\ne")
_FLIPPED = {">": "<", "\\ge": "\\le"}
_NAME = re.compile(
    r"(?:m?\\angle\s*)?(?:\\?[a-zA-Z]+'?(?:_(?:\w|\{\w+\}))?|\\text\{[^{}]*\})"
    r"(?:(?:\^\{-1\})?\([^()=]*\))?"
    r"|\((?:[a-zA-Z]|\\(?:theta|phi|rho))\s*(?:,\s*(?:[a-zA-Z]|\\(?:theta|phi|rho))\s*)+\)"
)


@dataclass(frozen=True)
class Shape:
    """The parts of a list, and what holds them.

    `kind` is "" for nothing, a pair of brackets such as "(]" and "{}", "union", or "matrix" with
    its numbers of rows and columns.
    """

    kind: str
    parts: tuple[str, ...]

    @property
    def single(self) -> bool:
        return len(self.parts) == 1 and self.kind in ("", "()", "{}")

    def order(self, other: "Shape") -> bool | None:
        """Whether parts compare in order; None where `other` cannot say what this gold does."""
        kinds = {self.kind, other.kind}
        if kinds <= {"", "{}"}:
            # Values without names are those of x, y, ... in their order.
            names = {_name_of(part) for part in self.parts} - {""}
            return len(names) == len(self.parts) > 1 and not any(map(_name_of, other.parts))
        if kinds <= {"", "()"} or kinds == {"()", f"matrix {len(self.parts)} 1"}:
            return True
        if len(kinds) == 1:
            return self.kind != "union"
        return None


def split(text: str, *marks: str) -> tuple[list[str], list[str]]:
    """The parts of `text` between `marks` that stand in no brackets, and these marks."""
    parts, found, depth = [""], [], 0
    for token in _TOKENS.findall(text):
        bare = token[-1] if token in ("\\{", "\\}") else token
        if depth == 0 and token in marks:
            found.append(token)
            parts.append("")
            continue
        depth = max(depth + (bare in _OPEN) - (bare in _CLOSE), 0)
        parts[-1] += token
    return [part.strip() for part in parts], found


def read_shape(text: str) -> Shape:
    r"""The parts of `text`, one if it is no list; a \pm b is a + b and a - b."""
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip().removesuffix("\\\\"))]
        cells = tuple(cell.strip() for row in rows for cell in row)
        return Shape(f"matrix {len(rows)} {len(rows[0])}", cells)
    union, _ = split(text, "\\cup")
    if len(union) > 1:
        return Shape("union", tuple(union))
    kind, inside = _unwrap(text)
    parts, _ = split(inside, ",")
    if len(parts) == 1 and kind not in ("", "()", "{}"):
        return Shape("", (text,))
    intervals = [as_interval(part) for part in parts]
    of_one_name = len({found and found[0] for found in intervals}) == 1 and intervals[0]
    if kind == "" and len(parts) > 1 and of_one_name:  # x < 1 or x > 3
        return Shape("union", tuple(found[1] for found in intervals if found))
    return Shape(kind, tuple(sign for part in parts for sign in _signs(part)))


def _unwrap(text: str) -> tuple[str, str]:
    """The brackets around the whole of `text`, "" for none, and what is in them."""
    tokens, depth = _TOKENS.findall(text), 0
    for index, token in enumerate(tokens):
        bare = token[-1] if token in ("\\{", "\\}") else token
        depth += (bare in _OPEN) - (bare in _CLOSE)
        if depth <= 0:
            if index == 0 or index < len(tokens) - 1:
                return "", text
            pair = tokens[0][-1] + bare
            return pair, "".join(tokens[1:-1]).strip()
    return "", text


def _signs(part: str) -> list[str]:
    parts, found = split(part, "\\pm", "\\mp")
    if len(found) != 1 or not parts[1]:
        return [part]
    return [f"{parts[0]}+{parts[1]}" if parts[0] else parts[1], f"{parts[0]}-{parts[1]}"]


def read_relation(text: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    r"""Sides and signs of a chain of inequalities, smallest side first; None for anything else."""
    sides, signs = split(text, *_RELATIONS)
    if not signs or not all(sides) or _is_list(text):
        return None
    if all(sign in _FLIPPED for sign in signs):
        return tuple(reversed(sides)), tuple(_FLIPPED[sign] for sign in reversed(signs))
    return (tuple(sides), tuple(signs)) if not set(signs) & set(_FLIPPED) else None


def as_interval(text: str) -> tuple[str, str] | None:
    r"""The one name in a chain of inequalities and the interval left to it; None for others."""
    relation = read_relation(text)
    if relation is None or "\\ne" in relation[1]:
        return None
    sides, signs = relation
    names = [bool(_NAME.fullmatch(side)) and "\\" not in side for side in sides]
    opens, closes = {"<": "(", "\\le": "["}, {"<": ")", "\\le": "]"}
    if names == [False, True, False]:
        return sides[1], f"{opens[signs[0]]}{sides[0]},{sides[2]}{closes[signs[1]]}"
    if names == [True, False]:
        return sides[0], f"(-\\infty,{sides[1]}{closes[signs[0]]}"
    if names == [False, True]:
        return sides[1], f"{opens[signs[0]]}{sides[0]},\\infty)"
    return None


def name_and_values(text: str) -> tuple[str, list[str]]:
    r"""What `text` names and the values it gives, as x and 5, 10/2 of x = 5 = 10/2; "" for no name.

    What follows \approx is left out where an exact value stands before it.
    """
    if _is_list(text):
        return "", [text]
    exact, _ = split(text, "\\approx")
    if len(exact) > 1 and exact[0] and not _is_name(exact[0]):
        text = exact[0]
    values, _ = split(text, "=", "\\approx", "\\in")
    values = [value for value in values if value] or [text]
    named = next((i for i, value in enumerate(values) if not _is_name(value)), len(values) - 1)
    return "".join("".join(values[:named][:1]).split()), values[named:]


def _is_name(text: str) -> bool:
    """Whether `text` stands for a value: a name, or a formula of names alone."""
    letters = re.sub(r"\\(?:frac|cdot|text|angle)", "", text)
    return bool(_NAME.fullmatch(text)) or not re.search(r"[\d\\^]|^[^a-zA-Z]*$", letters)


def _is_list(text: str) -> bool:
    return len(split(text, ",")[0]) > 1


def _name_of(text: str) -> str:
    return name_and_values(text)[0]
