r"""Numbers as answers write them, exactly, and the units after them.

Texts are in the one spelling of `trainer.tasks.spelling`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

RELATIVE = Fraction(1, 10**6)
"""How far a decimal may be from what it stands for, relatively."""
_LARGEST_EXPONENT = 4000
_DIGITS = r"(?:\d+\.?\d*|\.\d+)"
_POWER = r"(?:[eE](?P<e>[+-]?\d+)|(?:\\times|\\cdot|x)10\^\{?(?P<ten>[+-]?\d+)\}?)"
_DECIMAL = re.compile(rf"(?P<digits>{_DIGITS}){_POWER}?")
_TEN = re.compile(r"10\^\{?(?P<ten>[+-]?\d+)\}?")
_FRACTION = re.compile(
    rf"(?P<whole>\d+(?=\\))?(?:\\frac\{{(?P<over>-?{_DIGITS})\}}\{{(?P<under>-?{_DIGITS})\}}"
    rf"|(?P<a>{_DIGITS})/(?P<b>{_DIGITS}))"
)
_REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\overline\{(\d{1,50})\}")
_MIXED = re.compile(r"(-?\d+) +(\d+/\d+)")
_BASE = re.compile(r"([A-F]*[0-9][0-9A-F]*)_\{?(?:\\text\{)?(\d+|[a-z]{3,})\}{0,2}")
_UNIT = re.compile(
    r"(?P<value>.*?[^\s{(,])\s*(?P<unit>(?:\^\\circ)?"
    r"(?:\s*(?:/|\\cdot)?\s*\\text\{[^{}]*\}(?:\^(?:\d|\{-?\d\}))?)*)"
)
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|no|more|less|fewer|least|most|than|to|about|approx\w*|hundred|thousand"
    r"|[mbt]r?illion|dozen)\b"
)
_NO_VALUE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|text)(?![a-z])|[^\d}a-zA-Z.!]$")
_NAMES = {
    **dict.fromkeys(("centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("kilometer", "kilometre"), "km"),
    **dict.fromkeys(("meter", "metre"), "m"),
    **dict.fromkeys(("inches", "inch"), "in"),
    **dict.fromkeys(("feet", "foot"), "ft"),
    **dict.fromkeys(("second", "sec"), "s"),
    **dict.fromkeys(("hour", "hr"), "h"),
    **dict.fromkeys(("^\\circ", "degree"), "deg"),
    **dict.fromkeys(("unit", "unit^2", "units^2", "unit^3", "units^3"), ""),
    **dict.fromkeys(("euros", "eur", "€"), "euro"),
    "£": "lb",
    "gram": "g",
    "kilogram": "kg",
    "mile": "mi",
    "minute": "min",
    "ml": "mL",
    "pound": "lb",
    "usd": "dollar",
    "yard": "yd",
}


@dataclass(frozen=True)
class Number:
    """An exact value, and how it was written."""

    value: Fraction
    place: Fraction | None = None
    """One unit of a decimal's last digit; None for other numbers."""
    measured: bool = False
    """Whether it is in scientific notation with at least two digits."""

    def __mul__(self, factor: Fraction) -> "Number":
        place = None if self.place is None else self.place * factor
        return Number(self.value * factor, place, self.measured)

    def is_written_as(self, other: "Number") -> bool:
        """Whether `other` is right where this is the gold.

        Integers and fractions are exact. A decimal may differ from a gold that is no integer by
        `RELATIVE` and by less than a unit of the last place of either. A gold in scientific
        notation is a measured value, and any number that rounds to it is right too.
        """
        off = abs(self.value - other.value)
        if off == 0:
            return True
        if self.measured and self.place is not None and off * 2 <= self.place:
            return True
        places = [one.place for one in (self, other) if one.place is not None]
        if not places or (self.value.denominator == 1 and not self.measured):
            return False
        return off < min(places) and off <= RELATIVE * max(abs(self.value), abs(other.value))


def read_number(text: str) -> Number | None:
    r"""The number that `text` is and nothing else: -.5, 1e-5, 3\times10^{8}, 3/4, 1\frac{1}{2}."""
    mixed = _MIXED.fullmatch(text.strip())
    if not mixed and re.search(r"\d\s+\d", text):
        return None
    bare = f"{mixed[1]}\\frac{{{mixed[2].replace('/', '}{')}}}" if mixed else "".join(text.split())
    sign = -1 if bare.startswith("-") else 1
    bare = bare.removeprefix("-") if sign < 0 else bare.removeprefix("+")
    if found := _TEN.fullmatch(bare):
        power = int(found["ten"][:6])
        return Number(sign * Fraction(10) ** power) if abs(power) <= _LARGEST_EXPONENT else None
    if found := _REPEATING.fullmatch(bare):
        whole, start, period = found[1] or "0", found[2], found[3]
        once, all_of_it = int(whole + start), int(whole + start + period)
        return Number(sign * Fraction(all_of_it - once, (10 ** len(period) - 1) * 10 ** len(start)))
    if found := _DECIMAL.fullmatch(bare):
        return _decimal(sign, found)
    if found := _FRACTION.fullmatch(bare):
        under = Fraction(found["under"] or found["b"])
        if under == 0:
            return None
        part = Fraction(found["over"] or found["a"]) / under
        return Number(sign * (int(found["whole"] or 0) + part))
    return None


def _decimal(sign: int, found: re.Match) -> Number | None:
    digits, power = found["digits"], int((found["e"] or found["ten"] or "0")[:6])
    if abs(power) > _LARGEST_EXPONENT or len(digits) > _LARGEST_EXPONENT:
        return None
    after = len(digits.partition(".")[2])
    scale = Fraction(10) ** power
    scientific = found["e"] or found["ten"]
    return Number(
        sign * Fraction(digits.rstrip(".") if after == 0 else digits) * scale,
        place=scale / 10**after if after or power < 0 else None,
        measured=bool(scientific) and len(digits.replace(".", "").lstrip("0")) >= 2,
    )


@dataclass(frozen=True)
class Quantity:
    """What an answer says without its unit and percent sign; "" is no unit."""

    text: str
    unit: str = ""
    percent: bool = False


def read_quantity(text: str) -> Quantity:
    """`text` in parts; a number's base counts as its unit. What is no unit stays in the text."""
    base = _BASE.fullmatch(text)
    if base:
        return Quantity(base[1], f"base {base[2]}")
    percent = re.fullmatch(r"(.*\S)\s*\\%", text)
    if percent:
        return Quantity(percent[1], percent=True)
    found = _UNIT.fullmatch(text)
    if not found or not found["unit"] or _NO_UNIT.search(found["unit"]):
        return Quantity(text)
    if _NO_VALUE.search(found["value"]):
        return Quantity(text)
    return Quantity(found["value"], _unit(found["unit"]))


def _unit(text: str) -> str:
    """One name of each unit."""
    words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\cdot", " ")
    words = re.sub(r"\b(?:(m)|k)ph\b", lambda found: "mi / h" if found[1] else "km / h", words)
    words = re.sub(r"\bsq(?:uare|\.)?\s+(\w+)", r"\1^2", words)
    words = re.sub(r"\bcu(?:bic|\.)?\s+(\w+)", r"\1^3", words)
    words = re.sub(r"\^\{(-?\d)\}", r"^\1", words).replace(" per ", " / ").replace(".", "")
    words = re.sub(r"\s*\^\s*(?=[\d-])", "^", words)
    names = (_name(word) for word in re.split(r"\s+|(/)", words) if word)
    return " ".join(name for name in names if name)


def _name(word: str) -> str:
    stem, _, power = word.partition("^")
    if word.startswith("^"):
        return _NAMES.get(word, word)
    lower = stem if len(stem) < 3 and stem not in ("AM", "PM") else stem.lower()
    one = lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower
    name = _NAMES.get(lower, _NAMES.get(one, one))
    return f"{name}^{power}" if power and name else name
