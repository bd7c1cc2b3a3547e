"""From a question to the text that the policy continues."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Data

Messages = Sequence[Mapping[str, Any]]


def render(tokenizer: Any, prompt: str | Messages, data: Data) -> str:
    """The text of `prompt` with `data.instruction` and, where wanted, the chat template.

    `prompt` is text or chat messages with "role" and "content"; the instruction follows the last
    message after a blank line. `data.template` "auto" applies the template of `tokenizer`, up to
    the start of the assistant's turn, if it has one. Such text holds its special tokens already:
    tokenize it with `add_special_tokens=False`. Without a template a text stands as it is, and so
    does a single message; a template of one's own takes it in place of {question}. Both raise
    ValueError for a conversation.
    """
    messages = _messages(prompt, data.instruction)
    if data.template == "auto" and getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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
