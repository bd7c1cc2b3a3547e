"""Skipped steps, which update nothing: why, how many, and what to look at.

A row of metrics tells by "updates", the optimizer steps taken in its step, and "skipped/REASON".
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("right", "wrong", "truncated", "unparsed", "unverified")
"""The kinds of responses; each response is of one. Unverified: the verifier timed out or crashed.
Right: by the verdict. Truncated: stopped by the length limit. Unparsed: without an answer in the
form that the verifier reads. Wrong: all others."""
LOUD = 5
"""After so many skipped steps in a row a warning is printed; the next after twice as many."""

Row = Mapping[str, Any]


def took_step(update: Row) -> bool:
    """Whether the optimizer stepped in an update with these metrics."""
    return not any(value for key, value in update.items() if key.startswith("skipped/"))


def reasons(row: Row) -> list[str]:
    """The names of the reasons why the step of `row` was skipped; empty if it was not."""
    found = [
        key.removeprefix("skipped/")
        for key, value in row.items()
        if key.startswith("skipped/") and value
    ]
    return [] if row.get("updates", "loss" in row) else found


def reason(row: Row) -> str:
    """The reasons in words, such as "2 useful groups, 4 wanted"; empty if there are none."""
    return ", ".join(_words(name, row) for name in reasons(row))


def _words(name: str, row: Row) -> str:
    if name == "few_groups" and "groups/useful" in row:
        useful, wanted = float(row["groups/useful"]), row.get("groups/wanted")
        more = "" if wanted is None else f", {float(wanted):.0f} wanted"
        return f"{useful:.0f} useful group{'' if useful == 1 else 's'}{more}"
    return plain(name)


def plain(name: str) -> str:
    """A reason without its numbers: "few useful groups"."""
    if name.startswith("nonfinite_"):
        return f"{name.removeprefix('nonfinite_').replace('_', ' ')} not finite"
    return {
        "few_groups": "few useful groups",
        "all_truncated": "every response truncated",
        "no_tokens": "no token selected",
        "no_advantage": "every advantage 0",
    }.get(name, name.replace("_", " "))


@dataclass
class Skips:
    """Counts over the steps of a run, in their order."""

    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0
    """Steps skipped since the last update."""
    why: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> str:
        """Count the step of `row`; returns a warning to print, mostly empty."""
        if row.get("step") == 0:
            return ""
        self.steps += 1
        found = reasons(row)
        self.skipped += bool(found)
        self.in_a_row = self.in_a_row + 1 if found else 0
        self.why.update(found)
        times, rest = divmod(self.in_a_row, LOUD)
        return self.warning(row) if found and not rest and not times & (times - 1) else ""

    @property
    def never(self) -> bool:
        """Whether there were steps, and none updated the weights."""
        return 0 < self.steps == self.skipped

    def headline(self) -> str:
        """A sentence on the skipped steps; empty unless the last ones were skipped."""
        why = ", ".join(plain(name) for name, _ in self.why.most_common())
        if self.never:
            return (
                f"No step updated the weights: {self.skipped:,} of {self.steps:,} skipped, {why}."
            )
        if self.in_a_row >= LOUD:
            return f"The last {self.in_a_row:,} steps updated nothing; skipped: {why}."
        return ""

    def warning(self, row: Row) -> str:
        """A warning of several lines: what happens, and where to look."""
        return "\n  ".join(
            ["warning: " + self.headline(), *filter(None, [composition(row)]), *advice(row)]
        )


def composition(row: Row) -> str:
    """Shares of kinds of responses and groups in the step of `row`, as far as it has them."""
    shares = [
        f"{float(row[f'kind/{kind}']):.0%} {kind}" for kind in KINDS if row.get(f"kind/{kind}")
    ]
    groups = [
        f"{float(row[f'groups/{kind}']):.0f} {kind.replace('_', ' ')}"
        for kind in ("useful", "all_right", "all_wrong")
        if row.get(f"groups/{kind}") is not None
    ]
    parts = {"responses": shares, "groups": groups}
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in parts.items() if found)


def advice(row: Row) -> list[str]:
    """Settings to look at, given the kind of most responses or groups in the step of `row`."""
    groups = row.get("groups/sampled") or 1.0
    told = [
        (row.get("response/truncated"), "Most responses hit rollout.max_new_tokens."),
        (
            row.get("kind/unparsed"),
            "Most responses have no answer in the form that the verifier reads: look at "
            "data.template and data.instruction.",
        ),
        (
            row.get("kind/unverified"),
            "The verifier failed on most responses: look at reward.seconds, reward.gigabytes and "
            "the verifier itself.",
        ),
        (
            (row.get("groups/all_right") or 0.0) / groups,
            "Most groups are all right: the problems are too easy for this policy.",
        ),
        (
            (row.get("groups/all_wrong") or 0.0) / groups,
            "Most groups are all wrong: the problems are too hard, or right answers are not read "
            "as such.",
        ),
    ]
    found = [text for share, text in told if share is not None and share >= 0.5]
    return [*found, "samples.jsonl has responses of every kind."]
