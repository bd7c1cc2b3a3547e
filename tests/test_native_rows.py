"""The compiled products of pairs of rows and entropies of rows of logits, against fp64.

Every instruction set, dtype and tail; threads; what must not be read or written.
"""

import math

import pytest
import torch

from entropy_kernels import _native
from tests.head_cases import DTYPES

WHY = _native.why_missing("cpu")
pytestmark = pytest.mark.skipif(WHY is not None, reason=WHY or "built")
INSTRUCTION_SETS = _native.cpu().instruction_sets(models=True) if WHY is None else []
ROUNDING = 2.0**-24  # half a unit in the last place of fp32
DIMS = (1, 3, 16, 70, 257, 896)
PIECE = 512  # pairs of a run that are summed by themselves: kPiece


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    monkeypatch.setenv("EK_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def on_threads():
    """Calls a function on 1, 2 and 3 threads, and returns what it found."""
    before = torch.get_num_threads()

    def call(function):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(function())
        return found

    yield call
    torch.set_num_threads(before)


def rows_of(count, dim, dtype):
    """Rows that lie 5 values apart, so most do not begin where vectors would."""
    return torch.randn(count, dim + 5).to(dtype)[:, :dim]


def true_sums(scale, rows, i, place, count):
    """Sums of scaled rows per place, and those of their absolute values, in fp64."""
    terms = scale.double()[:, None] * rows[i].double()
    zeros = torch.zeros(count, rows.shape[1], dtype=torch.float64)
    return (x := zeros.index_add(0, place, terms)), zeros.index_add(0, place, terms.abs()) + 0 * x


def counted(function, *arguments):
    before = _native.products()
    function(*arguments)
    return _native.products() - before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots_are_those_of_fp64(isa, dtype):
    for dim in DIMS:
        left, right = rows_of(50, dim, dtype), rows_of(300, dim, dtype)
        left[7], right[11] = torch.nan, torch.nan
        i, j = torch.randint(50, (999,)), torch.randint(300, (999,))
        i[i == 7], j[j == 11] = 8, 12
        i[:50:7] = 7  # its pairs are NaN, and no others
        products = left[i].double() * right[j].double()
        got = _native.pair_dots(left, right, i, j)
        assert got.dtype == torch.float32
        assert torch.equal(got.isnan(), i == 7)
        error = (got - products.sum(1)).abs()
        steps = dim / 16 + 24  # of 4 sums of at least 4 lanes, and of their sum
        assert (error <= steps * ROUNDING * products.abs().sum(1))[i != 7].all()


@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_fp64(isa, dtype, add):
    """Short and long runs; pairs of scale 0, whose rows are NaN; every dtype of the sums."""
    for dim, out_dtype in zip(DIMS, DTYPES * 2, strict=True):
        rows, pairs, places = rows_of(200, dim, dtype), 4000, 60
        rows[7] = torch.nan
        i = torch.randint(200, (pairs,))
        place = torch.randint(places, (pairs,))
        place[:1700] = 20
        place = place.sort().values
        zero = (torch.rand(pairs) < 0.2) | (i == 7) | (place == 31) | (place == 59)
        scale = torch.randn(pairs).masked_fill(zero, 0)
        scale[zero & (i % 2 == 0)] = -0.0
        out = rows_of(places + 1, dim, out_dtype)
        before = out.double()
        count = counted(_native.pair_sums, scale, rows, i, place, out, add)
        assert count == int((~zero).sum()) * dim
        want, size = true_sums(scale, rows.nan_to_num(), i, place, places + 1)
        untouched = torch.ones(places + 1, dtype=torch.bool)
        untouched[place[~zero]] = False
        assert untouched[[31, 59, 60]].all()
        want = torch.where(untouched[:, None], before, want + before * add)
        runs = place.bincount(minlength=places + 1).clamp_max(PIECE + 4)[:, None]
        rounding = torch.finfo(out_dtype).eps / 2 * want.abs() + torch.finfo(out_dtype).tiny
        bound = (runs + 2) * ROUNDING * (size + before.abs() * add) + 1.01 * rounding
        assert ((out.double() - want).abs() <= bound).all()
        assert torch.equal(out[untouched].double(), before[untouched])


@pytest.mark.parametrize("pairs", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 9 * PIECE + 5])
def test_one_run_of_all_pairs(pairs, on_threads):
    rows, i, scale = rows_of(100, 130, torch.bfloat16), torch.arange(pairs) % 100, torch.rand(pairs)
    place = torch.full((pairs,), 2)

    def run():
        out = torch.ones(4, 130)
        _native.pair_sums(scale, rows, i, place, out, True)
        return out

    found = on_threads(run)
    assert all(torch.equal(out, found[0]) for out in found)
    assert (found[0][[0, 1, 3]] == 1).all()
    want, size = true_sums(scale, rows, i, place, 4)
    # Pieces keep the chain of additions short, so the error does not grow with the run.
    assert ((found[0][2] - 1 - want[2]).abs() <= 30 * ROUNDING * size[2]).all()


def test_products_have_the_same_bits_at_any_number_of_threads(on_threads):
    """Runs of every length begin and end on either side of each thread's first pair."""
    left, right = rows_of(300, 70, torch.float16), rows_of(900, 70, torch.float16)
    lengths = torch.tensor([*range(1, 60), 3000, 1, 2, 511, 512, 513, 1, 1024, 1025, 700] * 2)
    place = torch.arange(lengths.numel()).repeat_interleave(lengths)
    pairs = place.numel()
    i, j, scale = torch.randint(300, (pairs,)), torch.randint(900, (pairs,)), torch.randn(pairs)
    dots = on_threads(lambda: _native.pair_dots(left, right, i, j))
    assert all(torch.equal(x, dots[0]) for x in dots)
    for before in (0, 1, 13, 500, 1500):  # moves where threads begin

        def run(first=before):
            out = torch.zeros(lengths.numel(), 70)
            part = slice(first, None)
            _native.pair_sums(scale[part], right, j[part], place[part], out, False)
            return out

        sums = on_threads(run)
        assert all(torch.equal(x, sums[0]) for x in sums)
        want, size = true_sums(scale[before:], right, j[before:], place[before:], lengths.numel())
        assert ((sums[0] - want).abs() <= 500 * ROUNDING * size + 1e-30).all()


def test_sets_of_the_whole_vocabulary():
    """All pairs of 9 tokens and 301 ids: the products are those of matrices."""
    hidden, weight = rows_of(9, 40, torch.float32), rows_of(301, 40, torch.float32)
    i, j = torch.cartesian_prod(torch.arange(9), torch.arange(301)).unbind(1)
    logits = _native.pair_dots(hidden, weight, i, j).view(9, 301)
    torch.testing.assert_close(logits, hidden @ weight.T, rtol=1e-5, atol=1e-5)
    dhidden, dweight = torch.empty(9, 40), torch.empty(301, 40)
    _native.pair_sums(logits.view(-1), weight, j, i, dhidden, False)
    torch.testing.assert_close(dhidden, logits @ weight, rtol=1e-5, atol=1e-3)
    by_id = j.argsort(stable=True)
    _native.pair_sums(logits.view(-1)[by_id], hidden, i[by_id], j[by_id], dweight, False)
    torch.testing.assert_close(dweight, logits.T @ hidden, rtol=1e-5, atol=1e-3)


def test_products_are_counted():
    rows = torch.randn(8, 33)
    i, j = torch.randint(8, (2, 77))
    assert counted(_native.pair_dots, rows, rows, i, j) == 77 * 33
    scale = torch.ones(77)
    scale[::2] = 0
    place = torch.arange(77) // 2
    assert counted(_native.pair_sums, scale, rows, i, place, torch.empty(39, 33), False) == 38 * 33


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)], ids=["no pair", "no column"])
def test_nothing_to_multiply(shape):
    pairs, dim = shape
    rows, index = torch.randn(6, dim), torch.zeros(pairs, dtype=torch.int64)
    assert torch.equal(_native.pair_dots(rows, rows, index, index), torch.zeros(pairs))
    out = torch.ones(6, dim)
    assert counted(_native.pair_sums, torch.ones(pairs), rows, index, index, out, False) == 0
    assert (out == 1).all()


def test_a_nan_scale_is_no_zero():
    out = torch.zeros(2, 3)
    place = torch.tensor([0, 1])
    scale = torch.tensor([torch.nan, 2.0])
    _native.pair_sums(scale, torch.ones(1, 3), torch.zeros(2, dtype=torch.int64), place, out, False)
    assert out[0].isnan().all()
    assert (out[1] == 2).all()


def test_products_assert_what_they_cannot_read():
    rows, index = torch.randn(4, 6), torch.arange(4)
    scale, out = torch.ones(4), torch.zeros(4, 6)
    _native.pair_dots(rows, rows, index, index)
    dots = [
        (rows.double(), rows.double(), index, index),
        (rows, rows.half(), index, index),
        (rows, rows[:, :5], index, index),
        (rows.T, rows.T, index, index),
        (rows, rows, index.int(), index),
        (rows, rows, index, index + 1),
        (rows, rows, index - 1, index),
        (rows, rows, index[:3], index),
    ]
    for arguments in dots:
        with pytest.raises(AssertionError):
            _native.pair_dots(*arguments)
    sums = [
        (scale.double(), rows, index, index, out),
        (scale, rows, index, index.flip(0), out),
        (scale, rows, index, index + 1, out),
        (scale, rows, index, index, out[:, :5]),
        (scale, rows, index, index, out.double()),
        (scale[:3], rows, index, index, out),
    ]
    for arguments in sums:
        with pytest.raises(AssertionError):
            _native.pair_sums(*arguments, False)


def true_entropy(logits, temperature=None):
    """In fp64, with the maximum left out of the sums."""
    z = logits.double() / (1 if temperature is None else temperature.double()[:, None])
    top, at = z.max(1, keepdim=True)
    d = (z - top).scatter(1, at, -torch.inf)
    s = d.exp().sum(1)
    t = torch.where(d.isinf(), 0, d * d.exp()).sum(1)
    return s.log1p() - t / (1 + s)


def assert_entropies(got, want):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropies_are_those_of_fp64(isa, dtype):
    """Tails of steps, blocks and parts; flat and peaked rows; entries of -inf."""
    for vocabulary in (1, 2, 17, 64, 65, 4095, 4097, 32768, 70001):
        scale = torch.tensor([0.0, 0.3, 3.0, 8.0, 30.0])[:, None]
        logits = torch.randn(5, vocabulary + 3) * scale + 5
        logits = logits.masked_fill(torch.rand(logits.shape) < 0.3, -torch.inf).to(dtype)
        logits = logits[:, :vocabulary]
        logits[:, vocabulary // 2] = 6.0
        before = logits.clone()
        temperature = torch.tensor([1.0, 0.7, 1.3, 0.11, 9.0])
        assert_entropies(_native.entropy_from_logits(logits), true_entropy(logits))
        got = _native.entropy_from_logits(logits, temperature)
        assert_entropies(got, true_entropy(logits, temperature))
        assert torch.equal(got[1:2], _native.entropy_from_logits(logits[1:2], temperature[1:2]))
        one = _native.entropy_from_logits(logits, temperature[1:2])
        assert_entropies(one, true_entropy(logits, temperature[1:2].expand(5)))
        assert torch.equal(logits, before)


def test_entropies_keep_their_digits_down_to_1e_12(isa):
    """The maximum is first, in the middle and last; each other logit lies `gap` below it."""
    for vocabulary in (2, 5000, 151_936):
        gaps = [math.log(vocabulary) + x for x in (0.0, 5.0, 20.0, 31.0)]
        for at in (0, vocabulary // 2, vocabulary - 1):
            logits = torch.zeros(4, vocabulary)
            logits[:, at] = torch.tensor(gaps)
            want = true_entropy(logits)
            assert 5e-13 < want[-1] < 1e-10
            assert_entropies(_native.entropy_from_logits(logits), want)
            half = torch.tensor([0.5])
            assert_entropies(_native.entropy_from_logits(logits / 2, half), want)


def test_entropies_of_a_rising_and_a_falling_row():
    """Each block has a larger maximum than the last, or none."""
    rising = torch.linspace(-9, 9, 151_936)
    logits = torch.stack([rising, rising.flip(0), rising.floor(), (rising * 3).sin()])
    assert_entropies(_native.entropy_from_logits(logits), true_entropy(logits))


def test_rows_at_the_edges_of_a_distribution():
    lowest = torch.finfo(torch.float32).min
    logits = torch.zeros(9, 5000)
    logits[0] = -torch.inf
    logits[1, 4999] = torch.nan
    logits[2] = -torch.inf
    logits[2, 3] = torch.nan
    logits[3, 4500] = torch.inf
    logits[4] = -torch.inf
    logits[4, 4700] = -3.0  # all the mass
    logits[5] = lowest
    logits[6, :4998] = lowest
    logits[7, 1:] = -torch.inf
    logits[8, ::2] = -torch.inf
    got = _native.entropy_from_logits(logits)
    assert got[:4].isnan().all()
    want = torch.tensor([0.0, math.log(5000), math.log(2), 0.0, math.log(2500)])
    torch.testing.assert_close(got[4:], want, rtol=1e-6, atol=0)
    assert got[4] == got[7] == 0


def test_entropies_have_the_same_bits_at_any_number_of_threads(on_threads):
    for rows, vocabulary in ((1, 151_936), (2, 151_936), (7, 40_000), (300, 3000)):
        logits = torch.randn(rows, vocabulary) * 3
        found = on_threads(lambda logits=logits: _native.entropy_from_logits(logits))
        assert all(torch.equal(x, found[0]) for x in found)
        assert_entropies(found[0], true_entropy(logits))
        alone = torch.cat([_native.entropy_from_logits(row[None]) for row in logits])
        assert torch.equal(alone, found[0])


def test_entropies_of_no_row_and_of_no_column():
    assert _native.entropy_from_logits(torch.zeros(0, 9)).shape == (0,)
    assert _native.entropy_from_logits(torch.zeros(2, 0)).isnan().all()


def test_entropies_assert_what_they_cannot_read():
    logits = torch.zeros(3, 4)
    wrong = [
        (logits.double(), None),
        (logits.T, None),
        (logits[0], None),
        (logits, torch.ones(2)),
        (logits, torch.ones(3, dtype=torch.float64)),
    ]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            _native.entropy_from_logits(*arguments)
