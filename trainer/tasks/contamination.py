"""Questions that a model is evaluated on and also trained on."""

from collections.abc import Iterable, Mapping
from typing import Any

_WORDS = 5
"""The number of words at the start of a question by which it is looked for."""


def count_seen(questions: Iterable[Any], prompts: Iterable[Any]) -> int:
    """How many of `questions` stand whole in one of `prompts`, blanks and case aside.

    Both are text or chat messages. An instruction around the question hides it from no one; one of
    less than five words must be the whole prompt. It is linear in the length of all prompts.
    """
    wanted = [_words(question) for question in questions]
    whole = {" ".join(words) for words in wanted}
    starts: dict[tuple[str, ...], set[str]] = {}
    for words in wanted:
        if len(words) >= _WORDS:
            starts.setdefault(tuple(words[:_WORDS]), set()).add(" ".join(words))
    seen = set()
    for prompt in prompts:
        words = _words(prompt)
        if (text := " ".join(words)) in whole:
            seen.add(text)
        for place in range(len(words) - _WORDS + 1):
            for question in starts.get(tuple(words[place : place + _WORDS]), ()):
                rest = " ".join(words[place:])
                if rest == question or rest.startswith(question + " "):
                    seen.add(question)
    return sum(" ".join(words) in seen for words in wanted)


def _words(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return prompt.casefold().split()
    contents = (str(message["content"]) for message in prompt if isinstance(message, Mapping))
    return " ".join(contents).casefold().split()
