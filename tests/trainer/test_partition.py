"""Which rank reads which sequences: each once, within the budget, and as many tokens for all."""

import hypothesis
import pytest
from hypothesis import strategies

from trainer.partition import partition


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 50), max_size=40),
    ranks=strategies.integers(1, 5),
    budget=strategies.integers(1, 200),
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_every_sequence_once_within_the_budget(lengths, ranks, budget):
    parts = partition(lengths, ranks, budget)
    assert {len(part) for part in parts} == {ranks}
    every = [rows for part in parts for rows in part]
    assert sorted(row for rows in every for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in every)
    tokens = [sum(lengths[row] for row in rows) for rows in every]
    assert max(tokens) <= max(budget, *lengths, 1)
    assert tokens == sorted(tokens, reverse=True)
    # The last sequence of the fullest part went where there were the fewest tokens.
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    # No fewer hold them, but for what does not divide: the fullest could not take two parts more.
    least = -(-sum(lengths) // (ranks * max(budget, *lengths, 1)))
    assert max(1, least) <= len(parts) <= 2 * least + 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_fits_is_one_micro_batch(ranks):
    lengths = [5, 3, 8, 2, 2, 6, 9, 4]
    assert len(partition(lengths, ranks, 48 // ranks)) == 1
    assert len(partition(lengths, ranks, 24 // ranks)) == 2
    assert partition(lengths, 1, 39) == [[list(range(8))]]


def test_equal_sequences_are_dealt_evenly():
    parts = partition([7] * 24, 2, 21)
    assert [[len(rows) for rows in part] for part in parts] == [[3, 3]] * 4


def test_ranks_without_a_sequence():
    assert partition([4], 3, 10) == [[[0], [], []]]
    assert partition([], 2, 10) == [[[], []]]


def test_sequences_beyond_the_budget_come_alone():
    assert sorted(rows for part in partition([30, 30, 30], 1, 10) for rows in part) == [
        [0],
        [1],
        [2],
    ]
