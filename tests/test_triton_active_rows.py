"""The rows that carry gradient, numbered on the device, against torch's nonzero.

T tokens, C room for active rows.
"""

import pytest
import torch

from entropy_kernels import _rows
from entropy_kernels._triton.head_backward import launch_rows
from entropy_kernels._triton.head_backward.launch_rows import active_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

IGNORE = -100
SIZES = {
    "one": 1,
    "prime": 31,
    "a block": launch_rows.BLOCK,
    "one more": launch_rows.BLOCK + 1,
    "several": 3 * launch_rows.BLOCK + 7,
}


def make(count: int, keep: float = 0.3):
    """Three gradients, one of them expanded from a scalar, and targets."""
    logprob_T = torch.randn(count) * (torch.rand(count) < keep)
    entropy_T = torch.randn(count) * (torch.rand(count) < keep / 4)
    target_T = torch.randint(50, (count,))
    target_T[torch.rand(count) < 0.2] = IGNORE
    logsumexp_T = torch.tensor(0.0).expand(count)
    return [x.to(DEVICE) for x in (logprob_T, entropy_T, logsumexp_T, target_T)]


def check(found, gradients, target_T, limit=None):
    """Exactly the first `limit` active rows, in ascending order, and each row's place."""
    want = _rows.active_rows(gradients, target_T, IGNORE)
    assert found.number.item() == len(want)
    placed = want[: len(found.rows)]
    assert found.rows[: len(placed)].tolist() == placed.tolist()
    assert (found.rows[len(placed) :] == 0).all()
    slots = torch.full_like(target_T, -1).index_copy(0, placed, torch.arange(len(placed)).to(want))
    assert found.slot.tolist() == slots.tolist()
    assert found.rows.dtype == found.slot.dtype == found.number.dtype == torch.int32


@pytest.mark.parametrize("count", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_the_active_rows_in_ascending_order(count, keep):
    *gradients, target_T = make(count, keep)
    found = active_rows(tuple(gradients), target_T, IGNORE, None)
    assert len(found.rows) == found.number.item() == found.limit
    check(found, gradients, target_T)


@pytest.mark.parametrize("spare", [-3, 0, 5])
def test_a_bound_leaves_places_over_or_tells_that_it_was_too_small(spare):
    *gradients, target_T = make(300)
    number = len(_rows.active_rows(gradients, target_T, IGNORE))
    found = active_rows(tuple(gradients), target_T, IGNORE, number + spare)
    assert len(found.rows) == found.limit == number + spare
    assert (found.number.item() > found.limit) == (spare < 0)
    check(found, gradients, target_T)


def test_a_bound_of_nothing_and_one_beyond_all_rows():
    *gradients, target_T = make(40)
    nothing = active_rows(tuple(gradients), target_T, IGNORE, 0)
    assert nothing.limit == 0 < nothing.number.item()
    check(nothing, gradients, target_T)
    everything = active_rows(tuple(gradients), target_T, IGNORE, 10**9)
    assert len(everything.rows) == 40
    check(everything, gradients, target_T)


@pytest.mark.parametrize("blocks", [1, 2])
def test_programs_take_consecutive_blocks(blocks, monkeypatch):
    monkeypatch.setattr(launch_rows, "BLOCK", 16)
    monkeypatch.setattr(launch_rows, "MAX_PROGRAMS", 8)
    *gradients, target_T = make(16 * 8 * blocks - 3)
    check(active_rows(tuple(gradients), target_T, IGNORE, None), gradients, target_T)
    *gradients, target_T = make(16 * 8 * (blocks - 1) + 1)
    check(active_rows(tuple(gradients), target_T, IGNORE, 100), gradients, target_T)


def test_a_nan_is_a_gradient_and_a_negative_zero_is_none():
    logprob_T = torch.tensor([0.0, torch.nan, -0.0, 1e-45, torch.inf], device=DEVICE)
    target_T = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    found = active_rows((logprob_T, None, None), target_T, IGNORE, None)
    assert found.rows.tolist() == [1, 3, 4]


def test_absent_gradients_strides_and_small_integers():
    *gradients, target_T = make(67)
    strided = torch.stack([gradients[0], gradients[1]], 1)[:, 0]
    targets = torch.stack([target_T, target_T], 1)[:, 1].to(torch.int32)
    found = active_rows((strided, None, gradients[2]), targets, IGNORE, None)
    check(found, [strided, gradients[2]], target_T)
    none = active_rows((None, None, None), target_T, IGNORE, None)
    assert len(none.rows) == 0


@pytest.mark.parametrize("bound", [None, 0, 7])
def test_no_token(bound):
    empty = torch.empty(0, device=DEVICE)
    found = active_rows((empty, None, None), empty.long(), IGNORE, bound)
    assert len(found.rows) == len(found.slot) == found.number.item() == 0
