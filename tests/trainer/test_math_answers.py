"""Which answers are right: every pair of the table, and what is said of a response without one."""

from pathlib import Path

import pytest

from tests.trainer import answer_pairs, more_answer_pairs, other_answer_pairs
from trainer.tasks.math_answers import math_reward


def table() -> list[tuple[str, str, str, bool]]:
    """Group, gold, response and whether it is right."""
    tables = (answer_pairs, more_answer_pairs, other_answer_pairs)
    boxed = [group for one in tables for group in one.BOXED.items()]
    free = [group for one in tables[1:] for group in one.WHOLE.items()]
    rows = [
        (group, gold, text if whole else f"\\boxed{{{text}}}", right)
        for whole, groups in ((False, boxed), (True, free))
        for group, pairs in groups
        for gold, rights, wrongs in pairs
        for right, texts in ((True, rights), (False, wrongs))
        for text in texts
    ]
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
