r"""One spelling for the many that LaTeX, Unicode and plain text have of one answer.

What is left is LaTeX: `\frac{1}{2}`, `\text{cm}`, and a comma between the parts of a list.
"""

# ruff: noqa: RUF001

import re

_UNICODE = str.maketrans(
    {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {"−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/"}
    | {"π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "±": r"\pm ", "°": "^\\circ"}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∅": r"\emptyset "}
    | {"∪": r"\cup ", "∩": r"\cap ", "ℝ": r"\mathbb{R}", "½": r"\frac{1}{2}", "⁄": "/"}
    | {"²": "^{2}", "³": "^{3}", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "’": "'", "，": ","}
    | {"✓": "", "✔": "", "✅": "", "\ufe0f": ""}
    | {"（": "(", "）": ")", "：": ":", "％": "%", "．": ".", "＝": "="}
)
_TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox|hbox|emph|bm|boldsymbol"
    r"|operatorname)\s*\{([^{}]*)\}"
)
_FUNCTIONS = "sqrt|pi|log|ln|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|exp|theta|infty"
_UNITS = r"mm|cm|dm|km|ft|mi|yd|kg|mg|lbs?|oz|m[lL]|hrs?|min|sec|mph|cents?|deg|(?i:[ap]\.?m\b\.?)"
# In this order.
_RULES = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        # Separators of thousands that can be nothing else.
        (r"(?<=\d),\s*\\!\s*(?=\d{3})|(?<=[1-9])\{,\}(?=\d{3}(?!\d))", ""),
        (r"(?<=\d\d)\{,\}(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)(?:\\[,;:!]|\s*~)(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)\{,\}(?=\d)", "."),
        # Blanks, sizes and colours.
        (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\ "),
        (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:underline|checkmark|blacksquare)(?![a-zA-Z])", ""),
        (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[,;:!> ]|(?<!\\)~|\\(?:q?quad|hspace\{[^{}]*\}|phantom\{[^{}]*\})", " "),
        (r"\\(?:displaystyle|textstyle|limits|bigl?|bigr|Bigl?|Bigr|Biggl?|Biggr)(?![a-zA-Z])", ""),
        (r"\\(?:left|right)(?![a-zA-Z])\.?", ""),
        (r"[(\[]\s*(\\begin\{array\}(?:(?!\\begin).)*\\end\{array\})\s*[)\]]", r"\1"),
        # Marks of mathematics, and the dollars that money costs.
        (r"\\\$\s*(\d+(?:,\d{3})*(?:\.\d+)?)", r"\1\\text{dollar}"),
        (r"([£€¥₹])\s*(\d+(?:,\d{3})*(?:\.\d+)?)", r"\2\\text{\1}"),
        (r"\\\$|\$|(?<!\\)\\[()]|(?<!\\)\\[\[\]]", ""),
        # Words.
        (r"\\(?:rm|bf|it)(?![a-zA-Z])\s*", ""),
        (r"\\(?:mathbf|bm|boldsymbol|vec|mathcal)\s*\{(\w)\}", r"\1"),
        (_TEXT, r"\\text{\1}"),
        (r"\\text\{([^{}]*\d[^{}]*)\}", r" \1 "),
        (rf"\\text\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
        (r",?\s*\\text\{\s*(?:[,;]?\s*(?:and|or)|,|;)\s*\}", ","),
        (r"(?<=\d)\s*(?:\\text\{\s*to\s*\}|\bto\b|\\colon(?![a-zA-Z]))\s*(?=\d)", ":"),
        (r",?\s*\b(?<!\\)(?:and|or)\b(?![^{}]*\})", ","),
        (r"\\text\{\s*([ei])\s*\}", r" \1 "),
        (r"\\text\{\s*(?:percent|%|\\%)\s*\}|\\?%|(?<=\d)\s*percent\b", r"\\%"),
        (r"\s*;", ","),
        # Names of one thing.
        (r"\\(?:[dtcs]|nice)frac", r"\\frac"),
        (r"\\[dt]?binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}"),
        (r"\\[dt]binom", r"\\binom"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![a-zA-Z])", r"\\ln "),
        (r"\(\s*([\dA-F]+)\s*\)\s*_", r"\1_"),
        (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\(?:lbrace|{)\s*\\(?:rbrace|})|\\varnothing", r"\\emptyset "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\mathbb\s*R(?![a-zA-Z])|\\R(?![a-zA-Z])", r"\\mathbb{R}"),
        (r"\\(?:degree|degrees)(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ", r"^\\circ "),
        (rf"(?<![a-zA-Z\\])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![a-zA-Z\\])infinity(?![a-zA-Z])|\\infin(?![a-zA-Z])", r"\\infty "),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        # Braces that may be left out.
        (r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\[[^\[\]]*\]|)\s*(\w|\\pi)", r"\\sqrt\1{\2}"),
        (r"\\frac\s*([a-zA-Z\d])\s*([a-zA-Z\d])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([a-zA-Z\d])\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*([a-zA-Z\d])", r"\\frac\1{\2}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"([\d}])i(?![a-zA-Z])", r"\1 i"),
        # What stands after a number is its unit.
        (rf"(?<=\d)\s*((?:{_UNITS})(?![a-zA-Z]))", r"\\text{\1}"),
        (r"(?<=\d)\s+([a-zA-Z]{3,}(?: [a-zA-Z]+)*)\s*(?=$|,)", r"\\text{\1}"),
        # What an answer is wrapped in.
        (r"^(\s*\\text\{)?\s*(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer\s*(?:is|:)\s*:?", r"\1"),
        (r"\\text\{\s*\}", ""),
        (r"(?:^|(?<=[(\[,]))\s*\+", ""),
        (r"[\s.,:\\]+$", ""),
    )
)
_BARE_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_BLANK_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,]| \d)")
_WORDS = re.compile(r"\\text\{([^{}]*)\}")
_DIGITS_APART = re.compile(r"(?<=\d)\s+(?=\d)")
_BRACKET = re.compile(r"[(\[{]")


def spell(text: str) -> str:
    """`text`, an answer or a gold, in the one spelling."""
    text = text.translate(_UNICODE)
    for pattern, spelling in _RULES:
        text = pattern.sub(spelling, text)
    text = _BLANK_THOUSANDS.sub(lambda found: found[1].replace(" ", ""), text)
    if not _BRACKET.search(text.replace("\\text{", "")):  # (1,234) is a pair
        text = _BARE_THOUSANDS.sub(lambda found: found[1].replace(",", ""), text)
    return text.strip()


def squeeze(text: str) -> str:
    """`text` without what never tells two answers apart: blanks, and that words are text."""
    return "".join(_DIGITS_APART.sub("_", _WORDS.sub(r"\1", text)).split())
