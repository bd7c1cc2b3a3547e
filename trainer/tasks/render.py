"""From a question to the text that the policy continues."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from trainer.config import Data
from trainer.tasks.problem import Problem

_SHOWN = 200  # characters of a prompt in an error
Messages = Sequence[Mapping[str, Any]]


def pose(tokenizer: Any, prompt: str | Messages, answer: Any, data: Data) -> Problem:
    """The problem with the text of `render`."""
    return Problem(render(tokenizer, prompt, data), answer, _has_template(tokenizer, data))


def render(tokenizer: Any, prompt: str | Messages, data: Data) -> str:
    """The text of `prompt` with `data.instruction` and, where wanted, the chat template.

    `prompt` is text or chat messages with "role" and "content"; the instruction follows the last
    message after a blank line. `data.template` "auto" applies the template of `tokenizer`, up to
    the start of the assistant's turn, if it has one. Such text holds its special tokens already:
    it is a `Problem` that is `templated`. Without a template a text stands as it is, and so does a
    single message; a template of one's own takes it in place of {question}. Both raise ValueError
    for a conversation, and so does a chat template's own error.
    """
    messages = _messages(prompt, data.instruction)
    if _has_template(tokenizer, data):
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the tokenizer's chat template does not take the prompt {_short(messages)}: "
                f"{error}; set data.template, or change the prompt"
            ) from error
    if len(messages) > 1:
        raise ValueError(
            f"a prompt of {len(messages)} chat messages needs a tokenizer with a chat template and "
            f'template="auto", but template is {data.template!r} and the tokenizer is '
            f"{type(tokenizer).__name__}"
        )
    question = messages[0]["content"]
    if data.template in ("auto", "none"):
        return question
    return data.template.replace("{question}", question)


def _has_template(tokenizer: Any, data: Data) -> bool:
    return data.template == "auto" and bool(getattr(tokenizer, "chat_template", None))


def _short(messages: Messages) -> str:
    text = str(messages)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _messages(prompt: str | Messages, instruction: str) -> list[dict[str, str]]:
    """`prompt` as chat messages, the instruction appended to the last."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(f"a prompt must be text or a list of chat messages, not {prompt!r}")
    messages = []
    for message in prompt:
        fields = message if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'a chat message needs a text "role" and "content", not {message!r}')
        messages.append({"role": role, "content": content})
    if instruction:
        messages[-1]["content"] += "\n\n" + instruction
    return messages
