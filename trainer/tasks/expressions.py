r"""Whether two formulas are equal, as math-verify reads them.

Texts are in the one spelling of `trainer.tasks.spelling`.
"""

import itertools
import logging
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from trainer.tasks.quantities import Number, read_number

# It warns of having no time limit, which the verifier's process has.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_DIGITS = 60
_DEEPEST = 30  # brackets; the parser's time grows with the square of their depth
_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    # Its units are any of the letters c, d, g, h, l, m, o, s and t behind a digit.
    normalization_config=replace(LatexExtractionConfig().normalization_config, units=False),
)


def same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify finds the two equal; of constants their values decide."""
    if "\\text" in gold + answer or max(itertools.accumulate(map(_step, answer))) > _DEEPEST:
        return False
    # math-verify reads no capitals, and nothing that stands below a number.
    if _differ_in_case(gold, answer) or re.search(r"\d\s*_", f"{gold} {answer}"):
        return False
    try:
        return _same_parsed(gold, answer)
    except MemoryError:  # the process is to be replaced
        raise
    except Exception:  # SymPy raises errors of any kind, as on a deep formula; math-verify does so
        return False


def _same_parsed(gold: str, answer: str) -> bool:
    left, right = _parsed(gold), _parsed(answer)
    if left is None or right is None:
        return False
    constant = _is_constant(left), _is_constant(right)
    if all(constant):
        return _same_constants(left, right, read_number(gold), read_number(answer))
    if any(constant):
        return False
    return verify([left], [right], timeout_seconds=None)


def _step(character: str) -> int:
    return (character in "([{") - (character in ")]}")


def _parsed(text: str) -> Any:
    """What math-verify reads in `text`; None where it reads no mathematics."""
    found = parse(f"\\boxed{{{text}}}", [_LATEX], "no_fallback", parsing_timeout=None)
    if not found or not isinstance(found[0], sympy.Expr):
        return found[0] if found else None
    # It reads the imaginary unit as a name, which it says is not real.
    units = {name: sympy.I for name in found[0].free_symbols if str(name) == "i"}
    return found[0].subs(units) if units else found[0]


def _differ_in_case(gold: str, answer: str) -> bool:
    """Whether the letters are the same, capitals aside."""
    left, right = (set(re.sub(r"\\[a-zA-Z]+|[^a-zA-Z]", "", text)) for text in (gold, answer))
    return left != right and {x.lower() for x in left} == {x.lower() for x in right}


def _is_constant(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and not value.free_symbols


def _same_constants(left: Any, right: Any, gold: Number | None, answer: Number | None) -> bool:
    """Whether 60 digits agree, or a decimal and what it rounds; false without a finite value."""
    left, right = left.doit(), right.doit()
    if left.is_Rational and right.is_Rational:
        return left == right
    values = [sympy.N(one, _DIGITS) for one in (left, right)]
    off, size = abs(sympy.N(left - right, _DIGITS)), max(map(abs, values))
    if not size.is_finite or not off.is_finite:
        return False
    if (gold or answer) and all(value.is_real for value in values):
        exact = [Number(Fraction(str(value))) for value in values]
        return (gold or exact[0]).is_written_as(answer or exact[1])
    close = sympy.Float(10) ** (-12 if left.has(sympy.Float) or right.has(sympy.Float) else -40)
    return bool(off <= close * size)
