"""Sets that a trained model is evaluated on: the paper's six by short names, or any task."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import Data
from trainer.tasks import make_task
from trainer.tasks.problem import Task


@dataclass(frozen=True)
class Benchmark:
    """The place of a set's problems, and their columns."""

    hub: str
    """Its name on the hub."""
    split: str
    """The split that has the problems, whatever it is called."""
    prompt_field: str
    """The column of the question."""
    answer_field: str
    """The column of the answer, or of a list of answers that are right together."""


# Section 5.2 of "Beyond the 80/20 Rule" names the sets, not their copies on the hub: these are
# the ones that evaluations of other works load. 30, 30, 40, 500, 272 and 674 problems.
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer"),
    "amc23": Benchmark("math-ai/amc23", "test", "question", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer"),
    "olympiadbench": Benchmark("math-ai/olympiadbench", "test", "question", "final_answer"),
}


_READ = ("file:", "hub:")


def short_name(name: str) -> str:
    """The set's name in results: "aime24" for "aime24=PATH"."""
    return name if name.startswith(_READ) else name.partition("=")[0]


def has_own_columns(name: str) -> bool:
    """Whether `name` says where questions and answers are, and so in which form answers come.

    Rows of "file:" and "hub:" are read by the columns that a run or a call names.
    """
    return not name.startswith(_READ)


def check_sets(names: Sequence[str]) -> None:
    """Refuse, before anything is read, sets that `make_benchmark` will not find.

    Raises ValueError for a name of no known form, one that comes twice, and a path that is not
    there.
    """
    for name in names:
        known = name.partition("=")[0] in BENCHMARKS or name.startswith(_READ)
        if not known and not is_generated(name):
            raise ValueError(
                f'no data {name!r}; wanted {", ".join(BENCHMARKS)} (each also as "NAME=PATH"), '
                '"file:PATH", "hub:NAME[:CONFIGURATION]", "gym:NAME", "ladder" or "ladder:long"'
            )
        path = _local_path(name)
        if path and not Path(path).exists():
            raise ValueError(f"{name} cannot be read: there is no {path}")
    if len({short_name(name) for name in names}) < len(names):
        raise ValueError(f"data must name each set once; got {list(names)}")


def make_benchmark(name: str, data: Data, split: str, tokenizer: Any) -> Task:
    """The problems that `name` means, as the held-out ones of a task.

    It is one of BENCHMARKS, read from the hub or, as "NAME=PATH", from a file or folder with the
    same columns. It may be `split` of "file:PATH" or "hub:NAME[:CONFIGURATION]" with the columns of
    `data` (all rows of a file or folder without splits). Or it is a task that makes its own
    problems. Raises ValueError for any other name, and what the source raises.
    """
    check_sets([name])
    if is_generated(name):
        return make_task(replace(data, task=name), 0, tokenizer)
    short, _, path = name.partition("=")
    # Here, as it imports `datasets`: a task that makes its own problems needs none of it.
    from trainer.tasks.question_set import QuestionSet

    if short not in BENCHMARKS:
        return QuestionSet(name, name, split, data, tokenizer)
    known = BENCHMARKS[short]
    columns = replace(data, prompt_field=known.prompt_field, answer_field=known.answer_field)
    if path:
        return QuestionSet(short, f"file:{path}", known.split, columns, tokenizer)
    try:
        return QuestionSet(short, f"hub:{known.hub}", known.split, columns, tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}; a local copy is read as {short}=PATH") from error


def is_generated(name: str) -> bool:
    """Whether `name` is a task that makes any number of problems."""
    return name in ("ladder", "ladder:long") or name.startswith("gym:")


def _local_path(name: str) -> str:
    """The path on this machine that `name` gives; empty if it gives none."""
    if name.startswith("file:"):
        return name.removeprefix("file:")
    return "" if name.startswith("hub:") else name.partition("=")[2]
