"""The responses on a run's page: its first and its last sampled step, as many kinds as fit."""

from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from trainer.log import parse_row
from trainer.report.skips import KINDS

SAMPLES_A_STEP = 6
TOKENS_A_SAMPLE = 400
PROMPT = 2000  # Characters.
HEAT_LEVELS = 10
BLOCK = 1 << 20  # Bytes read at a time from the end of a file.

Row = Mapping[str, Any]


def ends(path: Path) -> list[dict[str, Any]]:
    """The rows of the first and of the last step in samples.jsonl, which may have gigabytes.

    A torn last line is left out. Raises ValueError, naming the file, for a damaged one.
    """
    if not path.exists():
        return []
    first: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = parse_row(path, line, f"line {number}", whole=line.endswith(b"\n"))
            if row is None or (first and row["step"] != first[0]["step"]):
                break
            first.append(row)
        size, start = file.seek(0, 2), 0
        if not first:
            return []
        last: list[dict[str, Any]] = []
        for blocks in (1 << i for i in range(40)):
            start = max(0, size - blocks * BLOCK)
            file.seek(start)
            last = _rows(path, file.read(size - start).split(b"\n")[1 if start else 0 :])
            if start == 0 or len({row["step"] for row in last}) > 1:
                break
    step = last[-1]["step"]
    return first + [row for row in last if row["step"] == step] * (step != first[0]["step"])


def _rows(path: Path, lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The rows of the last `lines`, of which the very last is empty or torn."""
    found = [
        parse_row(path, line, f"{len(lines) - number} lines before its end", number < len(lines))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return [row for row in found if row is not None]


def samples(rows: Sequence[Row], right: float) -> dict[str, Any]:
    """What the page shows of them: a column per step; tokens graded by entropy, on one scale.

    `right` is the least verdict on a right answer, for rows that do not tell their kind.
    """
    shown = [
        (step, _spread(list(group), right))
        for step, group in groupby(rows, lambda row: row["step"])
    ]
    values = [h for _, group in shown for s in group for h in s.get("entropy", ()) if h is not None]
    # The 98th percentile, lest one odd token bleach the rest.
    top = max(sorted(values)[int(0.98 * (len(values) - 1))], 0.1) if values else 1.0
    columns = [
        {"step": step, "samples": [_sample(row, top, _kind(row, right)) for row in group]}
        for step, group in shown
    ]
    return {
        "columns": columns,
        "top": f"{top:.2g}",
        "levels": range(HEAT_LEVELS + 1),
        "scored": bool(values),
    }


def _kind(row: Row, right: float) -> str:
    """The kind of a response; by its verdict if the run did not write it."""
    verdict = row["reward"]
    return row.get("kind") or ("right" if verdict is not None and verdict >= right else "wrong")


def _spread(rows: Sequence[Row], right: float) -> list[Row]:
    """Each kind in turn, up to SAMPLES_A_STEP."""
    kinds = [[row for row in rows if _kind(row, right) == kind] for kind in KINDS]
    turns = zip_longest(*kinds)
    return [row for turn in turns for row in turn if row is not None][:SAMPLES_A_STEP]


def _sample(sample: Row, top: float, kind: str) -> dict[str, Any]:
    texts = sample["tokens"][:TOKENS_A_SAMPLE]
    tokens = [{"text": visible("".join(texts)), "class": "", "title": ""}]
    trained = "not trained on"
    if sample.get("entropy"):
        trained = f"{sum(map(bool, sample['selected']))} selected"
        marks = zip(texts, sample["entropy"], sample["selected"], strict=False)
        tokens = [_token(*mark, top) for mark in marks]
    reward, length = sample["reward"], len(sample["tokens"])
    return {
        "prompt": visible(sample["prompt"][:PROMPT], ends="\n"),
        "cut": len(sample["prompt"]) > PROMPT,
        "reward": "not finite" if reward is None else f"{reward:g}",
        "kind": kind,
        "tokens": tokens,
        "more": max(0, length - TOKENS_A_SAMPLE),
        "about": f"{length} token{'' if length == 1 else 's'}, {trained}",
    }


def _token(text: str, entropy: float | None, selected: bool, top: float) -> dict[str, str]:
    level = 0 if entropy is None else round(min(entropy / top, 1) * HEAT_LEVELS)
    number = "entropy not finite" if entropy is None else f"{entropy:.3f} nats"
    return {
        "text": visible(text),
        "class": f"h{level}{' k' if selected else ''}",
        "title": number + (", selected" if selected else ""),
    }


def visible(text: str, ends: str = "↵\n") -> str:
    """`text` with line ends as `ends`, other control characters as their pictures (U+2400 on)."""
    shown = (c if c >= " " or c in "\n\t" else chr(0x2400 + ord(c)) for c in text)
    return "".join(shown).replace("\n", ends)
