"""The folder of an evaluation: what was asked, and every response, as far as it has come.

OUT/settings.json      what was asked for; another evaluation does not go into the same folder
OUT/generations.jsonl  one object a problem: "data", "problem" (its number), "prompt", "answer",
                       "responses": [{"text", "reward", "length", "truncated", "logprob",
                       "timed_out", "crashed"}]; lengths in tokens, "logprob" the sum of the tokens'
                       log-probs as sampled, in nats, the last two of the verifier
OUT/results.json       what results.py makes of them
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.batch import Rollouts
from trainer.log import append_text, replace_text
from trainer.tasks.problem import Problem

FILE = "generations.jsonl"
# What settings were before there were these.
_BEFORE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def open_folder(
    folder: Path,
    settings: Mapping[str, Any],
    free: Collection[str],
    problems: Mapping[str, Sequence[Problem]],
) -> dict[str, int]:
    """Make `folder`, or count in it the problems of each set that were answered.

    `settings` are plain values, of which those named in `free` may change; `problems` are those of
    each set. Raises ValueError where the folder holds an evaluation with other settings, or of
    other problems under the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / "settings.json", json.loads(json.dumps(settings))
    # Without an answer it is as good as new, such as after a start that failed.
    answered = (folder / FILE).exists() and (folder / FILE).stat().st_size
    before = _BEFORE | _settings(path) if answered and path.exists() else now
    different = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - set(free))
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {'; '.join(different)}. "
            "Choose another --out, or delete the folder."
        )
    replace_text(path, json.dumps(now, indent=2) + "\n")
    return _found(folder / FILE, problems)


def append(folder: Path, name: str, first: int, rollouts: Rollouts) -> list[dict[str, Any]]:
    """Add a line per problem of set `name`; the problems of `rollouts` count from `first`.

    Returns these lines.
    """
    logprobs = rollouts.split(rollouts.sampler_logprob_T.double())
    lines: dict[int, dict[str, Any]] = {}
    for b, group in enumerate(rollouts.group_B.tolist()):
        problem = rollouts.problems[b]
        row = {"data": name, "problem": first + group, **asdict(problem), "responses": []}
        response = {
            "text": rollouts.responses[b],
            "reward": float(rollouts.reward_B[b]),
            "length": int(rollouts.response_length_B[b]),
            "truncated": bool(rollouts.truncated_B[b]),
            "logprob": float(logprobs[b].sum()),
            "timed_out": bool(rollouts.timed_out_B[b]),
            "crashed": bool(rollouts.crashed_B[b]),
        }
        lines.setdefault(group, row)["responses"].append(response)
    append_text(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines.values()))
    return list(lines.values())


def rows(folder: Path, counts: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """The lines of each set of `counts`, up to its first so many problems."""
    with (folder / FILE).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["problem"] < counts.get(row["data"], 0):
                yield row


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --out") from error


def _found(path: Path, problems: Mapping[str, Sequence[Problem]]) -> dict[str, int]:
    """The number of problems of each set in `path`; a last line torn by a kill is cut off."""
    counts: dict[str, int] = {}
    if not path.exists():
        return counts
    text = path.read_bytes()
    os.truncate(path, text.rfind(b"\n") + 1)
    for i, line in enumerate(text.split(b"\n")[:-1]):
        try:
            row = json.loads(line)
            name, number, prompt = row["data"], int(row["problem"]), row["prompt"]
            row["responses"][0]["text"]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{path}, line {i + 1} is damaged ({type(error).__name__}: {error}). Take out that "
                "line and all after it, or choose another --out"
            ) from error
        counts[name] = number + 1
        own = problems.get(name, ())
        if number < len(own) and own[number].prompt != prompt:
            raise ValueError(
                f"{path} has another problem {number} of {name} than {name} has now; choose "
                "another --out"
            )
    return counts
