"""Triton's products over given sets and its entropies of logits: values, bits, what is not read.

P pairs, D hidden, R rows, V vocabulary.
"""

import functools

import pytest
import torch

from entropy_kernels import _pair_products, backends, device
from entropy_kernels._torch import pair_products as torch_pairs
from entropy_kernels._triton.common import products
from entropy_kernels._triton.pair_products import launch
from entropy_kernels._triton.sampling.launch import entropy_from_logits
from entropy_kernels.testing import Watch
from entropy_kernels.verification import first_use, logit_cases, pair_cases
from entropy_kernels.verification.offset_cases import spread
from tests.marks import nan_is_meant, sampled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [sampled(0.2), nan_is_meant]


@pytest.fixture(autouse=True)
def nan_memory():
    """What nobody has written is NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "hidden"), [(0, 64), (1, 64), (33, 896), (33, 100), (33, 1)])
def test_both_products_of_every_size(count, hidden, dtype):
    pair_cases.check_dots(dtype, DEVICE, hidden, count)
    for out_dtype, add in ((dtype, False), (torch.float32, True), (torch.float16, True)):
        pair_cases.check_sums(dtype, DEVICE, hidden, count, "short", out_dtype, add)


@pytest.mark.parametrize(
    ("chunk", "most", "count"), [(64, 4096, 64), (64, 4096, 700), (64, 4, 700), (8, 4096, 200)]
)
@pytest.mark.parametrize("kind", pair_cases.RUNS)
def test_runs_within_a_chunk_across_chunks_and_in_all_of_them(
    kind, chunk, most, count, monkeypatch
):
    """A run may end where a chunk does, begin there, or have many of them."""
    monkeypatch.setattr(launch, "CHUNK", chunk)
    monkeypatch.setattr(launch, "MAX_CHUNKS", most)
    for add in (False, True):
        pair_cases.check_sums(torch.bfloat16, DEVICE, 3, count, kind, torch.float32, add)


def test_thousands_of_short_runs():
    pair_cases.check_dots(torch.bfloat16, DEVICE, 1, 5000)
    pair_cases.check_sums(torch.bfloat16, DEVICE, 1, 5000, "short", torch.float32, True)


class Launched:
    """Notes grids instead of launching."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


def test_one_run_is_the_work_of_many_programs(monkeypatch):
    """Whatever its places, a program has a chunk of pairs; chunks grow beyond 4,096 of them."""
    kernels = Launched()
    monkeypatch.setattr(launch, "sums_kernel", kernels)
    monkeypatch.setattr(launch, "merge_sums_kernel", kernels)
    for count in (1 << 16, 1 << 20, (1 << 20) + 1):
        scale_P = torch.empty(count, device="meta")
        index_P = torch.empty(count, dtype=torch.int64, device="meta")
        rows = torch.empty(9, 1024, device="meta")
        launch.pair_sums(scale_P, rows, index_P, index_P, rows, False)
    assert kernels.grids[::2] == kernels.grids[1::2] == [(1024, 2), (4096, 2), (3277, 2)]


def test_a_sum_does_not_depend_on_the_columns_beside_it():
    """The bits of a block of columns are those of its columns alone, rows strided or not."""
    torch.manual_seed(0)
    found = pair_cases.pairs(torch.bfloat16, DEVICE, 600, 300, "long")
    wide = torch.zeros(found.places, 600, device=DEVICE)
    launch.pair_sums(found.scale, found.rows, found.i, found.place, wide, False)
    columns = found.rows.t().contiguous().t()
    strided = torch.zeros(600, found.places, device=DEVICE).t()
    launch.pair_sums(found.scale, columns, found.i, found.place, strided, False)
    assert torch.equal(wide, strided)
    dots = [
        launch.pair_dots(left, right, found.i % 50, found.i % 50, None)
        for left, right in ((found.rows, found.rows), (columns, found.rows), (columns, columns))
    ]
    assert torch.equal(dots[0], dots[1])
    assert torch.equal(dots[0], dots[2])


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_they_are_those_of_the_torch_path(index):
    torch.manual_seed(1)
    left, right = torch.randn(20, 48, device=DEVICE), torch.randn(30, 48, device=DEVICE)
    i_P = torch.randint(20, (200,), device=DEVICE).sort().values
    j_P = torch.randint(30, (200,), device=DEVICE)
    scale_P, keep_P = torch.randn(200, device=DEVICE), torch.rand(200, device=DEVICE) < 0.5
    got = _pair_products.pair_dots("triton", left, right, i_P.to(index), j_P.to(index), keep_P)
    torch.testing.assert_close(
        got, _pair_products.pair_dots("torch", left, right, i_P, j_P, keep_P)
    )
    outs = [torch.ones(20, 48, device=DEVICE) for _ in range(2)]
    launch.pair_sums(scale_P, right, j_P.to(index), i_P.to(index), outs[0], True)
    torch_pairs.pair_sums(scale_P, right, j_P, i_P, outs[1], True)
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_reaches_its_place_alone(scale):
    scale_P = torch.tensor([1.0, scale, 1.0], device=DEVICE)
    place_P = torch.tensor([0, 1, 2], device=DEVICE)
    out = torch.zeros(3, 4, device=DEVICE)
    launch.pair_sums(scale_P, torch.ones(3, 4, device=DEVICE), place_P, place_P, out, False)
    assert out.isfinite().all(1).tolist() == [True, False, True]


def test_live_pairs_alone_are_counted():
    found = pair_cases.pairs(torch.float32, DEVICE, 16, 90, "short")
    live, out = found.scale != 0, torch.zeros(found.places, 16, device=DEVICE)
    with Watch() as watch:
        launch.pair_dots(found.rows, found.rows, found.i, found.i, live)
    assert watch.products == 16 * int(live.sum())
    with Watch() as watch:
        launch.pair_dots(found.rows, found.rows, found.i, found.i, None)
        launch.pair_sums(found.scale, found.rows, found.i, found.place, out, False)
    assert watch.products == 16 * (90 + int(live.sum()))


def test_a_count_is_launched_only_for_somebody_who_asks(monkeypatch):
    monkeypatch.setattr(products, "_unread", None)
    monkeypatch.setattr(products, "count", None)
    index, one = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    assert launch.pair_dots(one, one, index, index, None).tolist() == [4.0] * 3


@pytest.mark.skipif(DEVICE.type == "cuda", reason="its rows are in memory that nobody touches")
def test_rows_2_30_elements_apart_are_found():
    found = pair_cases.pairs(torch.float32, DEVICE, 16, 90, "short")
    rows, far = found.rows[:5], spread(found.rows[:5])
    i_P, place_P = found.i % 5, torch.arange(90) // 18
    for left, right in ((far, rows), (rows, far)):
        got = launch.pair_dots(left, right, i_P, i_P, None)
        assert torch.equal(got, launch.pair_dots(rows, rows, i_P, i_P, None))
    outs = []
    for x, out in ((rows, torch.zeros(5, 16)), (far, spread(torch.zeros(5, 16)))):
        for _ in range(2):
            launch.pair_sums(found.scale, x, i_P, place_P, out, True)
        outs.append(out)
    assert torch.equal(*outs)
    z_RV = torch.randn(5, 16)
    assert torch.equal(entropy_from_logits(spread(z_RV), None), entropy_from_logits(z_RV, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", logit_cases.TEMPERATURES)
def test_entropies_of_every_kind_of_rows(kind, dtype):
    for rows, vocabulary, tiles in logit_cases.SHAPES:
        logit_cases.check_entropies(dtype, DEVICE, (rows, vocabulary), tiles, kind)


@pytest.mark.parametrize("tiles", [None, 1, 2, 7])
def test_entropies_are_the_same_however_columns_are_split(tiles):
    torch.manual_seed(2)
    z_RV = logit_cases.logits_of(9, 3 * 2048 + 5).to(DEVICE)
    want = entropy_from_logits(z_RV, None, 4)
    torch.testing.assert_close(
        entropy_from_logits(z_RV, None, tiles), want, rtol=2e-6, atol=0, equal_nan=True
    )


def test_small_entropies_keep_their_digits():
    """From 1e-1 to 1e-12 nats: two words, one far below the other."""
    d_R = torch.linspace(3, 31, 40, dtype=torch.float64)
    z_RV = torch.stack([torch.zeros_like(d_R), -d_R], 1).float().to(DEVICE)
    p = (-z_RV[:, 1].double().neg()).exp()
    truth = p.log1p() + p / (1 + p) * -z_RV[:, 1].double()
    assert float(truth.min()) < 1e-11
    got = entropy_from_logits(z_RV, None).double()
    assert float(((got - truth).abs() / truth).max()) < 1e-5


def test_no_rows_have_no_entropies():
    assert entropy_from_logits(torch.empty(0, 7, device=DEVICE), None).shape == (0,)


def broken(function, break_):
    def by(*arguments, **options):
        return break_(function, *arguments, **options)

    return by


def drop_last_column(dots, left, right, *rest):
    return dots(left[:, :-1], right[:, :-1], *rest)


def read_all(dots, left, right, i_P, j_P, keep_P):
    return dots(left, right, i_P, j_P, None) * (1 if keep_P is None else keep_P)


def drop_a_pair(sums, scale, *rest):
    sums(scale * (scale != scale[scale != 0][0]), *rest)


def write_everything(sums, scale, rows, i, place, out, add):
    if not add:
        out[place] = 0
    sums(scale, rows, i, place, out, add)


def forget_to_add(sums, *arguments):
    sums(*arguments[:-1], False)


def round_twice(sums, scale, rows, i, place, out, add):
    rounded = torch.zeros_like(out, dtype=torch.bfloat16)
    sums(scale, rows, i, place, rounded, False)
    written = torch.zeros(len(out), dtype=torch.bool)
    written[place[scale != 0]] = True
    out[written] = (out[written] if add else 0) + rounded[written].to(out.dtype)


@pytest.mark.parametrize("break_", [drop_last_column, read_all])
def test_broken_dots_are_found(break_):
    by = broken(launch.pair_dots, break_)
    with pytest.raises(AssertionError, match="dots"):
        pair_cases.check_dots(torch.bfloat16, DEVICE, 64, 90, by)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (drop_a_pair, "sums"),
        (write_everything, "without a live pair"),
        (round_twice, "sums"),
    ],
)
def test_broken_sums_are_found(break_, message):
    by = broken(launch.pair_sums, break_)
    with pytest.raises(AssertionError, match=message):
        pair_cases.check_sums(torch.float32, DEVICE, 8, 92, "short", torch.float32, False, by)


def test_sums_that_are_not_added_are_found():
    by = broken(launch.pair_sums, forget_to_add)
    with pytest.raises(AssertionError, match="sums"):
        pair_cases.check_sums(torch.float32, DEVICE, 8, 92, "short", torch.float32, True, by)


@pytest.mark.parametrize(
    "break_",
    [
        lambda f, z, t, tiles: f(z[:, :-1], t, tiles),
        lambda f, z, t, tiles: f(z, None if t is None else t.reciprocal(), tiles),
        lambda f, z, t, tiles: f(z, t, tiles) * (1 + 1e-4),
        lambda f, z, t, tiles: f(z, t, tiles).nan_to_num(0.0),
        lambda f, z, t, tiles: (z.float() / (1 if t is None else t[:, None])).softmax(1).log()
        .nan_to_num(neginf=0.0).mul(z.float().softmax(1)).sum(1).neg(),
    ],
    ids=["a column less", "times the temperature", "1e-4 off", "no NaN", "small ones lost"],
)  # fmt: skip
def test_broken_entropies_are_found(break_):
    by = broken(entropy_from_logits, break_)
    with pytest.raises(AssertionError):
        logit_cases.check_entropies(torch.float32, DEVICE, (9, 50), None, "one per row", by)


def test_auto_takes_the_kernels_only_where_they_were_found_right(monkeypatch):
    gpu = torch.device("cuda", 0)
    for op in ("support", "entropy_from_logits"):
        resolve = functools.partial(backends.resolve, op)
        for found, name in ((False, "torch"), (True, "triton")):
            asked = []

            def verified(*call, found=found, asked=asked):
                asked.append(call)
                return found and call[1] == gpu

            monkeypatch.setattr(backends, "verified", verified)
            assert resolve("auto", gpu, torch.bfloat16) == name
            assert asked[-1] == (op, gpu, torch.bfloat16)
            assert resolve("auto", torch.device("cpu"), torch.bfloat16) != "triton"


@pytest.mark.parametrize("op", ["support", "entropy_from_logits"])
def test_csrc_cuda_has_none_of_them(op, monkeypatch):
    monkeypatch.setattr(device, "architecture", lambda where: "sm_90")
    assert not first_use.measured(op, torch.device("cuda", 0), torch.bfloat16)
