"""Whether a response gives the right mathematical answer, by math-verify."""

import logging
import re

from math_verify import parse, verify

from trainer.tasks.answers import last_boxed

# It warns of having no time limit, which the verifier's process has.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def math_reward(gold: str, response: str) -> float:
    r"""1.0 where `response` answers as `gold` does, else 0.0.

    `gold` is a number or LaTeX, bare or within `$` or `\boxed`; of a worked solution that ends in
    `#### 42` the part after the mark counts. The response's last `\boxed` counts, else the last
    expression math-verify finds. Words, which math-verify would read as products of letters, and
    what it cannot parse are compared as text with the response's last `\boxed`, without regard to
    case, blanks, `$` and `\text`. What math-verify fails on is 0.0.
    There is no time limit here, and a response such as `\boxed{9^{9^{9^{9}}}}` takes for ever:
    outside of tests, call it through `trainer.rewards.verifier`, whose processes have one.
    """
    gold = gold.rpartition("####")[2].strip()
    parsed = [] if _WORDS.fullmatch(gold) else _parse_gold(gold)
    if parsed:
        return float(verify(parsed, parse(response, parsing_timeout=None), timeout_seconds=None))
    boxed = last_boxed(response)
    return float(boxed is not None and _normalised(boxed) == _normalised(last_boxed(gold) or gold))


def math_verifier(prompt: str, response: str, answer: str) -> float:
    """`math_reward` as a verifier's process calls it."""
    return math_reward(answer, response)


def _parse_gold(gold: str) -> list:
    """What math-verify reads in `gold`: no strings, and nothing where it reads no mathematics."""
    marked = gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}"
    return parse(marked, fallback_mode="no_fallback", parsing_timeout=None)


def _normalised(text: str) -> str:
    """`text` without what does not change an answer."""
    return "".join(_TEXT_COMMAND.sub(r"\1", text).replace("$", "").split()).casefold()
