"""Whether a response gives the right mathematical answer.

What an answer is made of (lists, brackets, units, numbers, words) is compared here, part by part
and exactly; math-verify compares the expressions that are left.
"""

import re
from fractions import Fraction

from trainer.tasks.answers import is_cut, last_boxed, marked_answer
from trainer.tasks.expressions import same_expression
from trainer.tasks.quantities import Number, Quantity, read_number, read_quantity
from trainer.tasks.shapes import Shape, as_interval, name_and_values, read_relation, read_shape
from trainer.tasks.spelling import spell, squeeze

LONGEST = 1000
"""Characters of an answer; a longer one is right only where it is the gold itself."""
_DEPTH = 8
_OPTION = r"(?i:(?:option|choice|answer)\s+)?"
_LETTER = re.compile(rf"{_OPTION}\(?([A-Z])\)?[.:]?")
_CHOICE = re.compile(rf"{_OPTION}(?:\(([A-Z])\)|([A-Z])\s*[.:)])(.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"^\s*(?:[,/]|[A-Z]\s*$)|\([A-Z]\)|\b[A-Z]\s*[.:)]|,\s*[A-Z]\s*(?:,|$)")
_WORDS = re.compile(r"[A-Za-z]{3,}[A-Za-z .'-]*")
_IN_TEXT = re.compile(r"(?:\\text\{[^{}]*\}\s*)+")
_TIME = re.compile(r"\d{1,2}:\d\d")
_PERCENT = Fraction(1, 100)
_LOOSE = re.compile(
    r"\$[^$\n]*[^\s$]\$(?!\d)|\\[(\[](?:(?!\\[(\[\])]).)+\\[)\]]"
    # No part of a larger formula, such as 5x.
    r"|(?<![\w^.])-?(?:\\?\$)?\d[\d,]*(?:\.\d+)?(?:[eE]-?\d+)?(?:/\d+)?(?![\w^(!])(?:\s*\\?%)?"
)
_BETWEEN = re.compile(r"[ ,]*(?:or|and)?[ ,]*")
_STATED = re.compile(r"(?i:(?:answer|(?:option|choice)(?=\s+is|:))\s*(?:is|:)\s*:?|####)")
_SENTENCE_END = re.compile(r"\.\s|\n")
_NOT = re.compile(r"(?i:\bnot\b|n't)")
_SCALE = r"\b(?:hundred|thousand|[mbt]r?illion|dozen)s?\b"
_HEDGE = re.compile(rf"(?i:\b(?:not|or|either|least|most|than)\b|n't|{_SCALE})")
_AFTER = re.compile(rf"(?i:\s*{_SCALE})")
_COMPARED = re.compile(r"(?:[<>≤≥≠]|\\(?:[lg]eq?|neq?|[lg]t|approx)(?![a-zA-Z]))\s*$")
_BOLD = re.compile(r"\*\*(?!\w)|(?<!\w)\*\*")


def math_reward(gold: str, response: str) -> float:
    r"""1.0 where `response` answers as `gold` does, else 0.0.

    `gold` is a number, LaTeX or words, bare or within `$` or `\boxed`; of a worked solution that
    ends in `#### 42` the part after the mark counts. In the response `marked_answer` counts.
    Without one, if it opens no box or tag, what follows its last "answer is" counts, else its last
    formula or number. docs/trainer.md says which answers are right. What math-verify fails on is
    0.0. There is no time limit here, and a response such as `\boxed{9^{9^{9^{9}}}}` takes for ever:
    outside of tests, call it through `trainer.rewards.verifier`, whose processes have one.
    """
    gold = gold.rpartition("####")[2]
    boxed = last_boxed(gold)
    gold = spell(gold if boxed is None else boxed)
    marked = marked_answer(response)
    if marked is not None:
        answers = [marked]
    else:
        answers = [] if is_cut(response) else _loose_answers(response)
    return float(any(_same(gold, spell(answer[: 2 * LONGEST])) for answer in answers))


def math_verifier(prompt: str, response: str, answer: str) -> float:
    """`math_reward` as a verifier's process calls it."""
    return math_reward(answer, response)


def _loose_answers(response: str) -> list[str]:
    """What a `response` without a mark may mean as its answer.

    It is the rest of the sentence after its last "answer is", or the one formula or number in it if
    nothing hedges that; else the last formula or number of the response, with those beside it.
    """
    response = _BOLD.sub("", response)
    *_, stated = _STATED.split(response)
    sentence = _SENTENCE_END.split(stated.lstrip(), maxsplit=1)[0].strip()
    if stated == response or not sentence:
        return _last_run(response)
    found = list(_LOOSE.finditer(sentence))
    alone = len(found) == 1 and not _HEDGE.search(sentence)
    return [sentence, found[0][0]] if alone else [sentence]


def _last_run(response: str) -> list[str]:
    """The last formula or number, with those of a list that it ends; none of a sentence that denies
    it, none that is compared, or counts thousands."""
    found = list(_LOOSE.finditer(response))
    if not found:
        return []
    first = last = found.pop()
    while found and _BETWEEN.fullmatch(response[found[-1].end() : first.start()]):
        first = found.pop()
    before, after = response[: first.start()], response[last.end() :]
    sentence = _SENTENCE_END.split(before)[-1] + _SENTENCE_END.split(after, maxsplit=1)[0]
    if _COMPARED.search(before) or _AFTER.match(after) or _NOT.search(sentence):
        return []
    return [response[first.start() : last.end()]]


def _same(gold: str, answer: str, depth: int = 0) -> bool:
    """Whether `answer` says what `gold` does, both in the one spelling."""
    if not gold or not answer:
        return False
    if squeeze(gold) == squeeze(answer):
        return True
    if depth > _DEPTH or len(answer) > LONGEST:
        return False
    if choice := _LETTER.fullmatch(squeeze(gold)):
        return _is_choice(choice[1], answer)
    if read_relation(gold) or read_relation(answer):
        return _same_relations(gold, answer, depth)
    if name_and_values(gold)[1] != [gold] or name_and_values(answer)[1] != [answer]:
        return _same_named(gold, answer, depth)
    golds, answers = read_shape(gold), read_shape(answer)
    if not (golds.single and answers.single):
        return _same_parts(golds, answers, depth)
    if (golds.parts[0], answers.parts[0]) != (gold, answer):
        return _same(golds.parts[0], answers.parts[0], depth + 1)
    return _same_value(gold, answer)


def _same_parts(gold: Shape, answer: Shape, depth: int) -> bool:
    """Part by part, in order or each gold with an answer of its own."""
    ordered = gold.order(answer)
    if ordered is None or len(gold.parts) != len(answer.parts):
        return False
    if ordered:
        return all(_same(*pair, depth + 1) for pair in zip(gold.parts, answer.parts, strict=True))
    left = list(answer.parts)
    for part in gold.parts:
        found = next((other for other in left if _same(part, other, depth + 1)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_relations(gold: str, answer: str, depth: int) -> bool:
    """Inequalities with the same sides, or as intervals; they are not solved."""
    left, right = read_relation(gold), read_relation(answer)
    if left and right:
        (sides, signs), (others, other_signs) = left, right
        if signs == ("\\ne",) and not _same(sides[0], others[0], depth + 1):
            others = others[::-1]
        return signs == other_signs and all(map(_same, sides, others, [depth + 1] * len(sides)))
    found = as_interval(gold if left else answer)
    if found is None:
        return False
    other = name_and_values(answer if left else gold)[1][-1]
    return _same(*((found[1], other) if left else (other, found[1])), depth + 1)


def _same_named(gold: str, answer: str, depth: int) -> bool:
    """Values of the same name, or of one that gold or answer leaves out."""
    (name, golds), (other, answers) = name_and_values(gold), name_and_values(answer)
    if (len(golds) > 1 and not name) or re.search(r"(?<!\{)[+-]", name):  # x + y = 3 names no value
        return "=" in answer and same_expression(gold, answer)
    if (not name or not other or name == other) and all(
        _same(golds[-1], value, depth + 1) for value in answers
    ):
        return True
    # A line or a curve has many equations; of a number the equation is no answer.
    return bool(name) and "=" in answer and _has_names(golds[-1]) and same_expression(gold, answer)


def _same_value(gold: str, answer: str) -> bool:
    """One value each, with units perhaps."""
    left, right = read_quantity(gold), read_quantity(answer)
    if left.unit and right.unit and left.unit != right.unit:
        return False
    number, other = read_number(left.text), read_number(right.text)
    if number and other:
        return _same_numbers(number, other, left, right)
    if _TIME.fullmatch(left.text) or left.unit.startswith("base"):
        return squeeze(left.text).lstrip("0") == squeeze(right.text).lstrip("0")
    if _is_words(left.text) or _is_words(right.text):
        return _letters(left.text) == _letters(right.text) and len(_letters(left.text)) > 1
    if left.percent != right.percent:
        return False
    return same_expression(left.text, right.text)


def _same_numbers(gold: Number, answer: Number, left: Quantity, right: Quantity) -> bool:
    """10% is 0.1, and 10 too where the gold is 10%; 10% is right for 10, but not 0.5% for 0.5."""
    if left.percent == right.percent:
        return gold.is_written_as(answer)
    if left.percent:
        return gold.is_written_as(answer) or (gold * _PERCENT).is_written_as(answer)
    if gold.is_written_as(answer * _PERCENT):
        return True
    return abs(gold.value) > 1 and gold.is_written_as(answer)


def _is_words(text: str) -> bool:
    return bool(_WORDS.fullmatch(text) or _IN_TEXT.fullmatch(text))


def _letters(text: str) -> str:
    return re.sub(r"[\s.,'-]", "", squeeze(text)).casefold()


def _has_names(text: str) -> bool:
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text))


def _is_choice(gold: str, answer: str) -> bool:
    """Whether `answer` is the letter that `gold` is, or begins with it and names no other."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer).strip()
    if alone := _LETTER.fullmatch(text):
        return alone[1] == gold
    found = _CHOICE.fullmatch(text)
    return (
        found is not None
        and (found[1] or found[2]) == gold
        and _OTHER_CHOICE.search(found[3]) is None
    )
