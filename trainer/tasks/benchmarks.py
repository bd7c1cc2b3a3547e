"""What a trained model is evaluated on: the paper's six sets by short names, or any other task."""

from dataclasses import dataclass, replace
from typing import Any

from trainer.config import Data
from trainer.problems import Task
from trainer.tasks import make_task


@dataclass(frozen=True)
class Benchmark:
    """Where a set's problems are, and in which columns."""

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


def make_benchmark(name: str, data: Data, split: str, tokenizer: Any) -> Task:
    """The problems that `name` means, as the held-out ones of a task.

    It is one of BENCHMARKS, read from the hub or, as "NAME=PATH", from a file or folder with the
    same columns; `split` of "file:PATH" or "hub:NAME[:CONFIGURATION]" with the columns of `data`
    (of a file or folder without splits, all rows); or a task that makes its own problems.
    Raises ValueError for any other name, and what the source raises.
    """
    if name in ("ladder", "ladder:long") or name.startswith("gym:"):
        return make_task(replace(data, task=name), 0, tokenizer)
    short, _, path = name.partition("=")
    if short not in BENCHMARKS and not name.startswith(("file:", "hub:")):
        raise ValueError(
            f'no data {name!r}; wanted {", ".join(BENCHMARKS)} (each also as "NAME=PATH"), '
            '"file:PATH", "hub:NAME[:CONFIGURATION]", "gym:NAME", "ladder" or "ladder:long"'
        )
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
