"""Random golds: every spelling of one is right, and no change of its value is."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.tasks.math_answers import math_reward

WHOLE = st.integers(-(10**7), 10**7)
SMALL = st.integers(-9, 9)
RATIONAL = st.builds(Fraction, st.integers(-500, 500), st.integers(1, 60))
CHANGE = st.sampled_from([1, -1, 2, 10, 100, 1000])
SEPARATORS = (",", "{,}", "\\,", ",\\!", "\\;")


def right(gold: str, answer: str) -> bool:
    return math_reward(gold, f"So \\boxed{{{answer}}}.") == 1.0


def fraction(value: Fraction, name: str = "frac") -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}\\{name}{{{abs(value.numerator)}}}{{{value.denominator}}}"


def wholes(value: int) -> list[str]:
    """Spellings of an integer."""
    grouped = f"{value:,}"
    return [
        str(value),
        f"{value}.0",
        f"${value}$",
        f"x = {value}",
        f"\\frac{{{3 * value}}}{{3}}",
        *(grouped.replace(",", mark) for mark in SEPARATORS),
        *([f"\\${grouped}"] if value >= 0 else []),
    ]


def rationals(value: Fraction) -> list[str]:
    """Spellings of a number that is no integer."""
    whole, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    return [
        fraction(value),
        fraction(value, "dfrac"),
        f"{value.numerator}/{value.denominator}",
        fraction(value, "tfrac"),
        f"\\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}",
        f"{float(value):.12f}" if abs(value) > 1 else fraction(value),
        *([f"{sign}{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"] if whole else []),
    ]


@settings(max_examples=40)
@given(WHOLE, CHANGE, st.data())
def test_integers(value, change, data):
    gold = data.draw(st.sampled_from(wholes(value)))
    for answer in wholes(value):
        assert right(gold, answer), (gold, answer)
    others = {value + change, -value, value * 10, int(str(value) + "1")} - {value}
    for other in others:
        for answer in wholes(other):
            assert not right(gold, answer), (gold, answer)
        for answer in (
            f"{value}, {other}",
            f"{other} \\text{{ or }} {value}",
            f"{other}={value}",
            f"{value}\\%, {other}",
        ):
            assert not right(gold, answer), (gold, answer)


@settings(max_examples=40)
@given(RATIONAL.filter(lambda value: value.denominator > 1), RATIONAL, st.data())
def test_fractions(value, change, data):
    gold = data.draw(st.sampled_from(rationals(value)))
    for answer in rationals(value):
        assert right(gold, answer), (gold, answer)
    others = {value + change, -value, 1 / value if value else value, value * 100} - {value}
    for other in others:
        for answer in rationals(other) if other.denominator > 1 else wholes(int(other)):
            assert not right(gold, answer), (gold, answer)
    for digits in (1, 2, 3):
        if Fraction(f"{float(value):.{digits}f}") != value:
            assert not right(fraction(value), f"{float(value):.{digits}f}")


@settings(max_examples=40)
@given(st.lists(SMALL, min_size=1, max_size=5), SMALL, st.randoms(use_true_random=False))
def test_lists(values, other, random):
    gold = ", ".join(map(str, values))
    shuffled = random.sample(values, len(values))
    for answer in (f"{', '.join(map(str, shuffled))}", f"\\{{{','.join(map(str, shuffled))}\\}}"):
        assert right(gold, answer), (gold, answer)
    changed = [*shuffled[1:], other]
    for wrong in (shuffled[1:], [*shuffled, other], *([changed] if other != shuffled[0] else [])):
        for marks in ("{}", "\\{{{}\\}}", "({})"):
            answer = marks.format(", ".join(map(str, wrong)))
            assert not right(gold, answer), (gold, answer)
    if shuffled != values:
        ordered = f"({gold})"
        assert right(ordered, f"\\left( {gold} \\right)")
        assert not right(ordered, f"({','.join(map(str, shuffled))})")


@given(SMALL, st.integers(1, 9), st.sampled_from("(["), st.sampled_from(")]"), st.booleans())
def test_intervals(low, size, opens, closes, as_relation):
    signs = {"(": "<", "[": "\\le ", ")": "<", "]": "\\le "}

    def spell(low: int, high: int, opens: str, closes: str) -> str:
        if as_relation:
            return f"{low} {signs[opens]} x {signs[closes]} {high}"
        return f"x \\in \\left{opens}{low}, {high}\\right{closes}"

    gold, high = f"{opens}{low},{low + size}{closes}", low + size
    assert right(gold, spell(low, high, opens, closes))
    assert not right(gold, spell(low - 1, high, opens, closes))
    assert not right(gold, spell(low, high + 1, opens, closes))
    assert not right(gold, spell(low, high, "([".replace(opens, ""), closes))
    assert not right(gold, spell(low, high, opens, ")]".replace(closes, "")))


@settings(max_examples=20)
@given(st.lists(SMALL, min_size=3, max_size=3), st.integers(0, 2), CHANGE)
def test_polynomials(factors, place, change):
    def spell(a: int, b: int, c: int) -> str:
        return f"{a}x^2 + {b}x + {c}".replace("+ -", "- ")

    a, b, c = factors
    gold = spell(a, b, c)
    assert right(gold, f"{c} + x({a}x + {b})".replace("+ -", "- "))
    assert right(f"y = {gold}", gold)
    changed = [value + change * (index == place) for index, value in enumerate(factors)]
    for answer in (
        spell(*changed),
        spell(a, b, c).replace("x", "t"),
        f"{gold} = {spell(*changed)}",
    ):
        if "x" in gold and (a or b):
            assert not right(gold, answer), (gold, answer)


UNITS = ["cm", "m", "km", "mm", "in", "ft", "kg", "g", "s", "min", "hours", "degrees", "cents"]


@given(st.integers(1, 500), st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_units(value, unit, other):
    gold = f"{value}\\text{{ {unit}}}"
    assert right(gold, f"{value} \\mathrm{{~{unit}}}")
    assert right(gold, str(value)) is right(str(value), gold) is True
    if unit != other:
        assert not right(gold, f"{value}\\text{{ {other}}}")
        assert not right(gold, f"{value}\\text{{ {unit}}}^2")


@given(st.integers(-40, 40), st.integers(1, 99), st.sampled_from([1, -1, 2]))
def test_powers_of_ten(power, mantissa, change):
    gold = f"{mantissa} \\times 10^{{{power}}}"
    assert right(gold, f"{mantissa}e{power}")
    assert right(f"{mantissa}e{power}", gold)
    for answer in (f"{mantissa} \\times 10^{{{power + change}}}", f"10^{{{power + change}}}"):
        if mantissa not in (1, 10):
            assert not right(gold, answer), (gold, answer)
    assert not right(gold, f"{mantissa + 1}e{power}")
    assert not right(gold, "0")
