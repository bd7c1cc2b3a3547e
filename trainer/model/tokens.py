"""Text to tokens and back, by the tokenizer's own rules."""

from collections.abc import Collection, Sequence
from typing import Any

from trainer.tasks.problem import Problem

_SAID = "said-by-the-assistant"


def prompt_ids(tokenizer: Any, problems: Sequence[Problem]) -> list[list[int]]:
    """The token ids of each prompt.

    A chat template has written its special tokens out. Other text gets in front what the tokenizer
    puts there, such as begin-of-sequence, unless it starts with it. What the tokenizer puts behind
    is left out, for the text goes on.

    Raises:
        ValueError: a prompt that gives no token.
    """
    texts = [problem.prompt for problem in problems]
    # Not verbose: the limit of a prompt is told elsewhere.
    plain = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    added = tokenizer(texts, verbose=False).input_ids
    found = [
        list(own) if problem.templated else [*_in_front(own, whole), *own]
        for problem, own, whole in zip(problems, plain, added, strict=True)
    ]
    for problem, ids in zip(problems, found, strict=True):
        if not ids:
            raise ValueError(
                f"a prompt must have tokens to continue; got {problem.prompt!r} (answer: "
                f"{problem.answer!r}), of which {type(tokenizer).__name__} makes none"
            )
    return found


def response_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that continues a prompt, without end-of-sequence."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def response_text(
    tokenizer: Any, tokens: Sequence[int], end_ids: Collection[int], keep_special: bool
) -> str:
    """The text of a response that a verifier reads: without special tokens, or only without those
    that begin, end and pad a text."""
    if not keep_special:
        return tokenizer.decode(tokens, skip_special_tokens=True)
    dropped = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *end_ids}
    kept = [token for token in tokens if token not in dropped]
    return tokenizer.decode(kept, skip_special_tokens=False)


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token, special ones included; together they are the text of `tokens`.

    A character of several tokens is the last one's; what never becomes a character too.
    """
    found: list[str] = []
    first = read = 0
    for end in range(1, len(tokens) + 1):
        before, now = tokenizer.decode(tokens[first:read]), tokenizer.decode(tokens[first:end])
        whole = not now.endswith("\N{REPLACEMENT CHARACTER}") or end == len(tokens)
        if len(now) > len(before) and whole:
            found.append(now[len(before) :])
            first, read = read, end
        else:
            found.append("")
    return found


def end_ids(tokenizer: Any, model: Any, chat: bool) -> list[int]:
    """Token ids that end a response, ascending.

    They are those of the model's generation, the tokenizer's, and those of the model that the
    tokenizer calls special. With `chat` the end of a turn is one too.
    A model's configuration that says nothing has its class's default, which may be any word.
    """
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= set(tokenizer.all_special_ids)
    model_ids = _ids(getattr(model.config.get_text_config(), "eos_token_id", None))
    found = _ids(model.generation_config.eos_token_id) | _ids(tokenizer.eos_token_id)
    return sorted(found | model_ids & special | (_end_of_turn(tokenizer) if chat else set()))


def _end_of_turn(tokenizer: Any) -> set[int]:
    """The special token that the chat template writes after the assistant's words, if it does."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    said = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _SAID}]
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False)
    except Exception:  # a template may refuse any conversation, in any way
        return set()
    if _SAID not in text:  # a template may change words
        return set()
    after = tokenizer(text.rpartition(_SAID)[2].lstrip(), add_special_tokens=False).input_ids
    return set(after[:1]) & {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _ids(value: int | Sequence[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def _in_front(own: Sequence[int], whole: Sequence[int]) -> Sequence[int]:
    """What `whole` has before `own`; nothing where that is there already, if only its beginning."""
    for start in range(len(whole) - len(own) + 1):
        if list(whole[start : start + len(own)]) == list(own):
            front = list(whole[:start])
            return [] if list(own[:1]) == front[:1] else front
    return []
