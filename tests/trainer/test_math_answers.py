"""Which answers are right: every pair of the table, and what is said of a response without one."""

from pathlib import Path

import pytest

from trainer.tasks.math_answers import math_reward

# Golds as public sets write them (MATH-500, AIME, AMC, Minerva, OlympiadBench, GSM8K); the pairs
# are made up. A boxed answer stands in a box; ⏎ is a line's end, ␣ a space at an end.
TABLE = Path(__file__).with_name("answers.tsv")


def table() -> list[tuple[str, str, str, bool]]:
    """Group, gold, response and whether it is right."""
    rows = []
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        place, group, verdict, gold, answer = line.replace("␣", " ").replace("⏎", "\n").split("\t")
        response = f"\\boxed{{{answer}}}" if place == "boxed" else answer
        rows.append((group, gold, response, {"right": True, "wrong": False}[verdict]))
    assert len(rows) == len(set(rows))
    return rows


def test_the_page_tells_the_size_of_the_table():
    right = sum(row[3] for row in table())
    page = " ".join((Path(__file__).parents[2] / "docs" / "trainer.md").read_text().split())
    assert f"{len(table())} pairs" in page
    assert f"{right} right and {len(table()) - right} wrong" in page


@pytest.mark.parametrize("group", dict.fromkeys(row[0] for row in table()))
def test_every_pair_of_the_table(group):
    rows = [row for row in table() if row[0] == group]
    wrong = [row[1:] for row in rows if math_reward(row[1], row[2]) != row[3]]
    assert wrong == []


@pytest.mark.parametrize(
    "piece", ["!", "(", "\\{", "-", "1e", "and", "9e9", "\\sqrt{", "\\frac1", "x=", "<1"]
)
def test_long_and_deep_answers_are_wrong_and_raise_nothing(piece):
    """What SymPy raises on them is of many kinds; a longer one is not even read."""
    for gold in ("34", "x^2+1"):
        for count in (300 // len(piece), 100_000):
            for response in (f"\\boxed{{{piece * count}}}", f"The answer is {piece * count}"):
                assert math_reward(gold, response) == 0.0
    # Deeper than SymPy's recursion goes.
    assert math_reward("34", f"\\boxed{{1{'!' * 900}}}") == 0.0
