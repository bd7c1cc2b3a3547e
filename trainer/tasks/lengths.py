"""Prompts before a run begins: each has a token, and leaves the model room for its responses."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from trainer.config import Config
from trainer.model.tokens import prompt_ids
from trainer.tasks.problem import Problem, Task

PROBED = 256
"""The number of problems of an endless task that are checked in each split."""
_BATCH = 1024


@runtime_checkable
class Table(Protocol):
    """A task whose prompts are rows of a table."""

    name: str
    num_test: int

    def problems(self, split: str) -> dict[int, Problem]:
        """Every problem of "train" or "test" by the number of its row."""
        ...

    def leave_out(self, split: str, numbers: Collection[int]) -> None:
        """Leave out the rows of these `numbers`."""
        ...


@dataclass(frozen=True)
class Room:
    """The longest prompt, and why."""

    tokens: int
    """The most tokens of a prompt; 0 or less: no prompt fits."""
    reason: str

    @staticmethod
    def of(longest: int | None, settings: Config) -> "Room | None":
        """The room that `longest`, the tokens of a policy's longest sequence, leaves for a prompt;
        None: no limit."""
        if longest is None:
            return None
        new = settings.rollout.max_new_tokens
        asked = settings.engine.max_model_len == longest
        limit = "engine.max_model_len of {:,}" if asked else "the model's {:,} positions"
        return Room(
            longest - new, f"rollout.max_new_tokens of {new:,} leaves of {limit.format(longest)}"
        )


def check_prompts(task: Task, tokenizer: Any, room: Room | None, longest: int) -> dict[str, int]:
    """Leave out the prompts of `task` longer than `longest` tokens (0: none); how many, by split.

    Only the first prompts of an endless task are looked at.

    Raises:
        ValueError: a prompt that cannot be rendered or encoded, that gives no token, or that does
            not fit into `room`; a split of which nothing is left.
    """
    if room is not None and room.tokens < 1:
        raise ValueError(f"no prompt fits into the {room.tokens:,} tokens that {room.reason}")
    table = task if isinstance(task, Table) else None
    left_out: dict[str, int] = {}
    kept: dict[tuple[str, int], int] = {}  # tokens, by split and number
    for split in ("train", "test"):
        problems = table.problems(split) if table else _first(task, split)
        what = f"{task.name}: {_of(table)} {{}} of {split}"
        lengths = _lengths(problems, tokenizer, what)
        if table:
            left_out[split] = _leave_out(table, split, lengths, longest)
        kept |= {(split, n): length for n, length in lengths.items()}
    _check_room(task.name, kept, room, table)
    return left_out


def _of(table: Table | None) -> str:
    return "row" if table else "problem"


def _leave_out(table: Table, split: str, lengths: dict[int, int], longest: int) -> int:
    """Take the longer ones out of `table` and `lengths`; returns their number."""
    long = [n for n, length in lengths.items() if longest and length > longest]
    if len(long) == len(lengths):
        raise ValueError(
            f"{table.name}: all {len(lengths):,} prompts of {split} are longer than "
            f"data.max_prompt_tokens={longest}; the shortest has {min(lengths.values())}"
        )
    table.leave_out(split, set(long))
    for number in long:
        del lengths[number]
    return len(long)


def _first(task: Task, split: str) -> dict[int, Problem]:
    count = PROBED if split == "train" else min(PROBED, task.num_test)
    return {i: task.problem(split, i) for i in range(count)}


def _lengths(problems: Mapping[int, Problem], tokenizer: Any, what: str) -> dict[int, int]:
    """Tokens of each prompt."""
    numbers = list(problems)
    found: dict[int, int] = {}
    for start in range(0, len(numbers), _BATCH):
        batch = numbers[start : start + _BATCH]
        try:
            ids = prompt_ids(tokenizer, [problems[number] for number in batch])
        except Exception:
            # One by one, for the one that is at fault: tokenizers raise exceptions of no class.
            ids = [_ids(problems[number], tokenizer, what.format(number)) for number in batch]
        found |= {number: len(own) for number, own in zip(batch, ids, strict=True)}
    return found


def _ids(problem: Problem, tokenizer: Any, what: str) -> list[int]:
    try:
        return prompt_ids(tokenizer, [problem])[0]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{what}: the tokenizer cannot encode {problem.prompt!r:.80}: {error}. Another "
            "model.path has another tokenizer"
        ) from error


def _check_room(
    name: str, lengths: Mapping[tuple[str, int], int], room: Room | None, table: Table | None
) -> None:
    if room is None or max(lengths.values()) <= room.tokens:
        return
    over = {place: length for place, length in lengths.items() if length > room.tokens}
    split, number = max(over, key=lambda place: over[place])
    leave_out = f", or leave them out by --data.max-prompt-tokens {room.tokens}" if table else ""
    raise ValueError(
        f"{name}: {len(over):,} of {len(lengths):,} prompts are longer than the {room.tokens:,} "
        f"tokens that {room.reason}; the longest, {_of(table)} {number} of {split}, has "
        f"{over[split, number]:,}. Lower rollout.max_new_tokens{leave_out}"
    )
