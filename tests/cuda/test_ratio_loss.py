"""The CUDA kernels of the ratio loss, on fibers: as the torch path, and exact where it must be.

B sequences, L their length.
"""

import math

import numpy as np
import pytest
import torch

from entropy_kernels import losses
from entropy_kernels._torch.ratio_loss import ratio_loss as in_torch
from entropy_kernels.verification import token_cases

from . import host
from .answers import answers

INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
BOUND = losses.LOG_RATIO_BOUND
CPU = torch.device("cpu")
# Tokens of a chunk, whose loads a block has in flight, and of a grid with one chunk per block.
CHUNK, GRID = 512, 512 * 1024
CLIPS = [(0.2, 0.28, None), (0.0, 0.0, 3.0), (1.0, 0.28, 1.5), (0.0, 0.5, None)]
MUTANTS = [
    host.Mutant(name, "ratio_loss.cu", old, new)
    for name, old, new in (
        ("barrier left out", "__syncthreads();", ""),
        ("ratio on the clip outside", "(ratio < b.low ||", "(ratio <= b.low ||"),
        ("dual clip for the gradient alone", "most < loss ? most : loss", "false ? most : loss"),
        ("gradient past the bound", "low || high || outside ||", "low || high ||"),
        ("NaN dropped with its advantage", ") && plain == plain", ")"),
        ("NaN dropped by the maximum", "b > a || b != b", "b > a"),
        ("unselected tokens in the ratio", "token.selected ? ratio : 0.0f", "ratio"),
        ("next sequence's weight", "if (place >= a.length)", "if (place >= a.length - 1)"),
        ("excess without its last digits", "n == 0.0f ? p : far", "far"),
        ("sums in fp32", "double loss = 0.0, ratio", "float loss = 0.0, ratio"),
        ("last block left out", "stream, a, blocks)", "stream, a, blocks - 1)"),
        ("second chunk left out", "first += kChunk", "first += end"),
        ("tail past the end", "if (i < end) a.grad", "a.grad"),
    )
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return lambda **options: host.build(
        tmp_path_factory.mktemp("ratio_loss"), [host.HERE / "ratio_loss_host.cpp"], **options
    )


@pytest.fixture(scope="module")
def program(build):
    return build()


def numbers(logprob, old, advantage, selected, weight, low, high, dual, bound):
    yield np.array(logprob.shape, np.int64)
    yield np.array([low, high, dual or 0.0, bound], np.float64)
    for x in (logprob, old, advantage, selected, weight):
        yield x.contiguous().numpy()


def losses_of(program, batches, seed=0):
    """(loss, grad, sums, counts) of every batch."""
    written = answers(program, (x for batch in batches for x in numbers(*batch)), seed)
    found = []
    for logprob, *_ in batches:
        sizes = [(1, np.float32), (logprob.numel(), np.float32), (4, np.float32), (3, np.int64)]
        parts = []
        for count, dtype in sizes:
            bytes_ = count * np.dtype(dtype).itemsize
            part, written = written[:bytes_], written[bytes_:]
            parts.append(torch.from_numpy(np.frombuffer(part, dtype).copy()))
        found.append((parts[0][0], parts[1].view(logprob.shape), *parts[2:]))
    assert not written
    return found


def check_shapes(program, shapes, monkeypatch):
    """Two bounds around fp64, counts and NaN as `verification` has them for a GPU's kernels."""
    monkeypatch.setattr(
        token_cases, "_ratio_loss_by", lambda _: lambda *batch: losses_of(program, [batch])[0]
    )
    for shape in shapes:
        for per_sequence in (False, True)[: 1 + (shape[0] > 1)]:
            torch.manual_seed(0)
            token_cases._ratio_loss("", CPU, shape, per_sequence, None if per_sequence else 2.0)


def every_token():
    """All log ratios with all advantages, away from the clips or on them."""
    log_ratios = [0.0, 0.1, -0.1, 1.0, -1.0, 5.0, 20.0, -20.0, 20.5, -21.0, INF, -INF, NAN]
    advantages = [0.0, -0.0, 1.0, -1.0, 0.3, -2.5, NAN]
    both = torch.cartesian_prod(torch.tensor(log_ratios), torch.tensor(advantages))
    return both.repeat(2, 1), torch.arange(2 * len(both)) < len(both)


def check_tokens(program):
    """Which gradients are zero or NaN, all counts, and whether the sums are NaN: exactly."""
    tokens, selected = every_token()
    weight = torch.tensor([0.37])
    generator = torch.Generator().manual_seed(0)
    batches = []
    for clips in CLIPS:
        for count in (len(tokens), 12, 12, 5, 1, 1):
            chosen = torch.randperm(len(tokens), generator=generator)[:count]
            x, advantage = (column[None] for column in tokens[chosen].unbind(1))
            batches.append(
                (x, torch.zeros_like(x), advantage, selected[chosen][None], weight, *clips, BOUND)
            )
    for got, batch in zip(losses_of(program, batches), batches, strict=True):
        want = in_torch(*batch)
        assert torch.equal(got[0].isnan(), want[0].isnan())
        assert torch.equal(got[2].isnan(), want[2].isnan())
        torch.testing.assert_close(got[1], want[1], rtol=4 * EPS, atol=0, equal_nan=True)
        assert torch.equal(got[1] == 0, want[1] == 0)
        assert torch.equal(got[3], want[3])
        if not want[0].isnan():
            torch.testing.assert_close(got[0], want[0], rtol=8 * EPS, atol=0)
            torch.testing.assert_close(got[2], want[2], rtol=8 * EPS, atol=8 * EPS * 21)


def check_exponentials(program):
    """exp and exp - 1 - x, one token at a time through the sums."""
    points = torch.cat([torch.linspace(-20, 20, 41), torch.logspace(-6, 0, 25)])
    one, yes = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    batches = [(one * x, one * 0, one, yes, one[0], 0.2, 0.2, None, 20.0) for x in points]
    for x, (_, _, sums, _) in zip(points.double(), losses_of(program, batches), strict=True):
        assert (sums[1] - x.exp()).abs() <= 1.5 * EPS * x.exp()
        assert (sums[3] - (x.expm1() - x)).abs() <= 2 * EPS * (x.expm1() - x)


def check_empty(program):
    shapes = [(0, 0), (0, 5), (3, 0)]
    empty = [torch.empty(shape) for shape in shapes]
    batches = [(x, x, x, x > 0, torch.ones(len(x)), *CLIPS[0], BOUND) for x in empty]
    for loss, grad, sums, counts in losses_of(program, batches):
        assert loss == 0
        assert grad.numel() == 0
        assert sums.tolist() == [0] * 4
        assert counts.tolist() == [0] * 3


def check_sums(program):
    """Losses of 1e-8 beside two that cancel: fp32 would drop them."""
    advantage = torch.full((1, CHUNK), 1e-8)
    advantage[0, :2] = torch.tensor([1.0, -1.0])
    zero, weight = torch.zeros_like(advantage), torch.tensor([1.0])
    batch = (zero, zero, advantage, zero == 0, weight, *CLIPS[0], BOUND)
    loss = losses_of(program, [batch])[0][0]
    torch.testing.assert_close(loss, -advantage.double().sum().float(), rtol=EPS, atol=0)


SHAPES = [*[(1, n) for n in (1, 15, 17, 511, 512, 513, 4999)], (1200, 1), (3, 700), (101, 33)]


# Several chunks per block.
LARGE = (GRID // 1009 + 1, 1009)


def check(program, monkeypatch):
    for holds in (check_tokens, check_exponentials, check_empty, check_sums):
        holds(program)
    check_shapes(program, [*SHAPES, LARGE], monkeypatch)


@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_any_shape_is_within_two_bounds_of_fp64(program, monkeypatch, shape):
    check_shapes(program, [shape], monkeypatch)


@pytest.mark.parametrize("holds", [check_tokens, check_exponentials, check_empty, check_sums])
def test_exact_where_it_must_be(program, holds):
    holds(program)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_same_bits_in_every_schedule_and_no_race(build, program, sanitizer):
    torch.manual_seed(0)
    batches = []
    for shape in ((1, 1), (3, 400), (CHUNK + 1, 1)):
        *values, selected, _ = token_cases.ratio_batch(shape, CPU)
        batches.append((*values, selected, torch.rand(shape[0]), *CLIPS[1], BOUND))
    given = [x for batch in batches for x in numbers(*batch)]
    want = answers(program, given)
    checked = build(sanitizer=sanitizer)
    for seed in range(3):
        assert answers(program, given, seed) == want
        assert answers(checked, given, seed) == want


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_kernels_are_refused(build, monkeypatch, mutant):
    # What is written past the end would be a crash, sooner or later.
    broken = build(mutant=mutant, sanitizer="address" if mutant.name == "tail past the end" else "")
    with pytest.raises(AssertionError):
        check(broken, monkeypatch)
