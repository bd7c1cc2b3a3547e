"""Keeps a policy's text from running as code inside reasoning-gym's scorers.

Some scorers of reasoning-gym 0.1.25 give the answer to Python's `eval`, others to SymPy's parser,
which evaluates too. Answers to these pass only in a harmless form. It costs nothing but formulas
with other functions, such as an `Integral` that repeats the question. The other scorers need no
care.
"""

import ast
import re

# Evaluated for partial credit only; the full score takes the plain text of a string or a grid.
TEXT_SCORERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
# Evaluated as a formula.
FORMULA_SCORERS = frozenset(
    {
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)

_TEXT = re.compile(r"[A-Za-z0-9_ \n-]*")
_FUNCTIONS = {"Abs", "acos", "asin", "atan", "cos", "exp", "ln", "log", "sin", "sqrt", "tan"}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_MAX_FORMULA = 1000  # characters
_MAX_NUMBER = 10**15
_MAX_EXPONENT = 100


def harmless(name: str, answer: str) -> bool:
    """Whether the scorer of dataset `name` may see `answer`."""
    if name in TEXT_SCORERS:
        return _TEXT.fullmatch(answer) is not None
    if name in FORMULA_SCORERS:
        return _is_formula(answer)
    return True


def _is_formula(text: str) -> bool:
    """True for arithmetic on numbers, one-letter names and common functions, with small powers."""
    if len(text) > _MAX_FORMULA:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return _plain(tree.body)


def _plain(node: ast.expr) -> bool:
    """Whether `node` and all below it are of the allowed kinds."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= _MAX_NUMBER
        case ast.Name(id=name):
            return len(name) == 1 and name.isascii()
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _plain(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            powers = (isinstance(below, ast.Pow) for below in ast.walk(left))
            return _plain(left) and _small_exponent(right) and not any(powers)
        case ast.BinOp(left=left, op=op, right=right):
            return isinstance(op, _ARITHMETIC) and _plain(left) and _plain(right)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return name in _FUNCTIONS and all(map(_plain, arguments))
    return False


def _small_exponent(node: ast.expr) -> bool:
    """Whether `node` is a number, a name, or a quotient of two, too small to take long."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= _MAX_EXPONENT
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _small_exponent(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _small_exponent(left) and _small_exponent(right)
    return isinstance(node, ast.Name) and _plain(node)
