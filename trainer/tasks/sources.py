"""Reading prompt sets: files, folders of `datasets`, the hub, and their columns."""

import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from trainer.tasks.split import stable_hash

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_source(source: str) -> tuple[Any, Any]:
    """The train and test splits of "file:PATH" or "hub:NAME[:CONFIGURATION]".

    Test is None where the source has none. A source of a single split, whatever its name, is all
    train; splits by other names than these two are not used. Raises ValueError for what cannot be
    read.
    """
    splits = _splits(source)
    if len(splits) == 1:
        return next(iter(splits.values())), None
    if "train" not in splits:
        raise ValueError(f'{source} has no split "train"; its splits are {", ".join(splits)}')
    return splits["train"], splits.get("test")


def load_split(source: str, split: str) -> Any:
    """The split `split` of a source, as `load_source` names it, or the only split.

    No other split of a hub data set is read. Raises ValueError for what cannot be read.
    """
    splits = _splits(source, split)
    if len(splits) > 1 and split not in splits:
        raise ValueError(f"{source} has no split {split!r}; its splits are {', '.join(splits)}")
    return splits[split] if split in splits else next(iter(splits.values()))


def _splits(source: str, split: str | None = None) -> Mapping[str, Any]:
    kind, _, where = source.partition(":")
    try:
        loaded = _load_file(Path(where)) if kind == "file" else _load_hub(where, split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    return loaded if isinstance(loaded, Mapping) else {split or "train": loaded}


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of column `name`, `reward_model.ground_truth` for a nested one; None if absent."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def distinct_prompts(
    source: str, dataset: Any, prompt_field: str, answer_field: str
) -> dict[int, int]:
    """The first row in `dataset` of each different prompt, by the prompt's `stable_hash`.

    Raises ValueError, naming the place, for no rows, a missing column, and a row whose answer is
    none (`answer_text`).
    """
    if len(dataset) == 0:
        raise ValueError(f"{source} is empty")
    first: dict[int, int] = {}
    used = {
        field if field in dataset.column_names else field.partition(".")[0]
        for field in (prompt_field, answer_field)
    }
    there = sorted(used & set(dataset.column_names))
    # A selection of no column has no rows.
    for number, row in enumerate(dataset.select_columns(there) if there else [{}]):
        prompt, _ = read_row(source, dataset, number, row, prompt_field, answer_field)
        first.setdefault(stable_hash(json.dumps(prompt, sort_keys=True)), number)
    return first


def digest(dataset: Any, rows: Mapping[int, int], answer_field: str) -> str:
    """A digest of the prompts' hashes and the answers of `rows`, from `distinct_prompts`."""
    column = (
        answer_field if answer_field in dataset.column_names else answer_field.partition(".")[0]
    )
    answers = dataset.select_columns([column])
    found = hashlib.sha256()
    for key, number in rows.items():
        found.update(f"{key} {lookup(answers[number], answer_field)}\n".encode())
    return found.hexdigest()[:16]


def read_row(
    source: str,
    dataset: Any,
    number: int,
    row: Mapping[str, Any],
    prompt_field: str,
    answer_field: str,
) -> tuple[Any, str]:
    """The prompt of `row`, row `number` of `dataset`, and the text of its answer.

    Raises ValueError, naming the place, where one is missing or the answer is none.
    """
    prompt, answer = lookup(row, prompt_field), lookup(row, answer_field)
    for field, value in ((prompt_field, prompt), (answer_field, answer)):
        if value in (None, "", []):
            columns = sorted({*dataset.column_names, *dataset.flatten().column_names})
            raise ValueError(
                f"{source}: row {number} has nothing in column {field!r}; the columns are "
                f"{', '.join(columns)}"
            )
    try:
        return prompt, answer_text(answer)
    except ValueError as error:
        raise ValueError(f"{source}: row {number}: column {answer_field!r} {error}") from error


def answer_text(answer: Any) -> str:
    """The gold answer in a column: text as it is, and a number in digits.

    Several answers, such as the roots of an equation, are right together; they become a list, as
    a response would write it. Raises ValueError for what is neither text nor a finite number.
    """
    if isinstance(answer, list | tuple):
        return ", ".join(map(answer_text, answer))
    if hasattr(answer, "item"):  # a scalar of numpy
        answer = answer.item()
    if isinstance(answer, str):
        return answer
    if isinstance(answer, float) and math.isfinite(answer):  # 0.1 + 0.2 is meant as 0.3
        return min(repr(answer), f"{answer:.15g}", key=len)
    if isinstance(answer, numbers.Real | Decimal) and math.isfinite(answer):
        return str(answer)
    raise ValueError(f"must hold text, finite numbers or lists of them; got {answer!r}")


def _load_hub(where: str, split: str | None) -> Any:
    name, _, configuration = where.partition(":")
    return datasets.load_dataset(name, configuration or None, split=split)


def _load_file(path: Path) -> Any:
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    if path.suffix not in _BUILDERS:
        raise ValueError(f"wanted a folder saved by datasets or one of {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    try:
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        bad_line = _bad_line(path) if path.suffix == ".jsonl" else None
        raise ValueError(bad_line or str(error)) from error


def _bad_line(path: Path) -> str | None:
    """What is wrong with the first line of a .jsonl file that is no JSON object."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON: {error}"
            if not isinstance(row, dict):
                return f"line {number} is not a JSON object: {line.strip()[:80]}"
    return None
