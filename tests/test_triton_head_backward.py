"""The compacted backward of the Triton kernels: its gradients against fp64, and what it may cost.

T tokens, C room for active rows, D hidden, V vocabulary.
"""

import pytest
import torch

from entropy_kernels import device
from entropy_kernels._bounds import assert_within_two_bounds
from entropy_kernels._triton.common import products
from entropy_kernels._triton.head_backward import launch
from entropy_kernels._triton.head_forward.launch import forward
from entropy_kernels.head import Head
from tests.backward_cases import (
    DEVICE,
    IGNORE,
    OPTIONS,
    CountProducts,
    active,
    active_numbers,
    allowed,
    gradients_of,
    make,
    options_of,
    three_of,
    tiles_here,
)
from tests.marks import sampled

pytestmark = sampled(0.2)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# NumPy computes in the interpreter, and warns of the infinities and NaN that these tests need.
infinities = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="counts products as on a CPU")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(launch, "CHUNK_V", 64)
    monkeypatch.setattr(launch, "DZ_BYTES", 0)


def run(grads, h, w, y, b=None, temperature=None, softcap=None, keep=False, **kwargs):
    """Forward, then the launcher."""
    needs = kwargs.pop("needs", (True, True, b is not None))
    variant = kwargs["tile"].variant if kwargs.get("tile") else "pointer"
    head = Head(h, w, y, b, temperature, softcap, IGNORE)
    rows = forward(head, keep_logits=keep, variant=variant)
    return launch.backward(tuple(grads), head, rows, needs, **kwargs)


def check(got, inputs, **options):
    """Both bounds for every gradient; 16-bit inputs round dz to 16 bits, as in eager."""
    got = [x for x in got if x is not None]
    three = three_of(*inputs, **options)
    more = allowed(three[0], *inputs[1:3], **options)
    for *quartet, allowance in zip(got, *three, more, strict=True):
        assert quartet[0].isfinite().all()
        assert_within_two_bounds(*quartet, operands=inputs[1].dtype, allowance=allowance)


@pytest.mark.parametrize("tile", tiles_here(), ids=lambda tile: tile.variant)
@pytest.mark.parametrize("names", [{}, OPTIONS["all"]], ids=["plain", "all options"])
def test_every_tile(tile, names):
    inputs = (gradients_of(39), *make())
    options = options_of(inputs[1:], **names)
    check(run(*inputs, **options, tile=tile), inputs, **options)
    number = active(inputs[0], inputs[3])
    bounded = run(*inputs, **options, tile=tile, max_active_rows=number + 50)
    for got, want in zip(bounded, run(*inputs, **options, tile=tile), strict=True):
        assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize("used", range(3), ids=["logprob", "entropy", "logsumexp"])
def test_an_output_that_is_not_used_has_no_gradient(used):
    grads, h, w, y = gradients_of(39), *make()
    zeros = [g if i == used else torch.zeros_like(g) for i, g in enumerate(grads)]
    grads = [g if i == used else None for i, g in enumerate(grads)]
    check(run(grads, h, w, y), (zeros, h, w, y))


@infinities
@pytest.mark.parametrize("stored", [False, True], ids=["recomputed", "stored"])
@pytest.mark.parametrize("spare", [0, 1, 40])
def test_places_left_over_add_nothing(spare, stored):
    """Places left over point to row 0: neither its NaN nor the weight's infinities reach them."""
    grads, h, w, y = gradients_of(39), *make()
    b = torch.zeros(w.shape[0], device=DEVICE)
    b[7:9] = -torch.inf
    y[y == 7] = y[y == 8] = 3
    h[0] = torch.nan
    for g in grads:
        g[0] = 0.0
    exact = run(grads, h, w, y, b, keep=stored)
    number = active(grads, y)
    bounded = run(grads, h, w, y, b, keep=stored, max_active_rows=number + spare)
    for got, want in zip(bounded, exact, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    idle = torch.ones(39, dtype=torch.bool, device=DEVICE)
    idle[active_numbers(grads, y)] = False
    assert idle[0]
    assert (bounded[0][idle] == 0).all()


@infinities
@pytest.mark.parametrize("bound", [0, 1, "one too few"])
def test_more_active_rows_than_the_bound_are_never_silent(bound):
    grads, h, w, y = gradients_of(39), *make()
    b = torch.zeros(w.shape[0], device=DEVICE)
    bound = active(grads, y) - 1 if isinstance(bound, str) else bound
    for gradient in run(grads, h, w, y, b, max_active_rows=bound):
        assert gradient.isnan().all()
    weight_grad = torch.zeros(w.shape, device=DEVICE)
    run(grads, h, w, y, max_active_rows=bound, main_grad=weight_grad)
    assert weight_grad.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_gradient_is_added_to_a_given_buffer(dtype, monkeypatch):
    grads, h, w, y = gradients_of(39), *make(dtype=dtype)
    # In stages of 50 rows.
    monkeypatch.setattr(launch, "STAGING_BYTES", 50 * 4 * w.shape[1])
    before = torch.randn(w.shape, device=DEVICE)
    buffer = before.clone()
    dhidden, dweight, dbias = run(grads, h, w, y, main_grad=buffer)
    assert dweight is None
    assert dbias is None
    want = run(grads, h, w, y)
    assert torch.equal(dhidden, want[0])
    added, rounded = buffer - before, want[1].float()
    torch.testing.assert_close(added, rounded, rtol=torch.finfo(dtype).eps, atol=1e-5)


@interpreted
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("frozen", [None, 0, 1, 2], ids=["none", "hidden", "weight", "bias"])
def test_products_are_those_of_the_active_rows_and_of_what_is_needed(frozen, splits, monkeypatch):
    monkeypatch.setattr(device, "processors", lambda device: splits)
    grads, h, w, y = gradients_of(39), *make((39, 16, 152))
    b = torch.zeros(w.shape[0], device=DEVICE)
    needs = tuple(i != frozen for i in range(3))
    number = active(grads, y)
    with CountProducts(monkeypatch, products) as counted:
        got = run(grads, h, w, y, b, needs=needs)
    assert counted.batched == (splits > 1 and needs[0])
    assert counted.products == (needs[0] + needs[1]) * number * w.numel()
    for gradient, wanted in zip(got, needs, strict=True):
        assert (gradient is not None) == wanted
    for gradient, full in zip(got, run(grads, h, w, y, b), strict=True):
        assert gradient is None or torch.equal(gradient, full)


def test_nothing_to_do_launches_no_product(monkeypatch):
    h, w, y = make()
    b = torch.zeros(w.shape[0], device=DEVICE)
    zeros = torch.zeros(39, device=DEVICE)
    ignored = torch.full_like(y, IGNORE)
    for grads, targets in (([zeros] * 3, y), (gradients_of(39), ignored), ([None] * 3, y)):
        with CountProducts(monkeypatch, products) as counted:
            got = run(grads, h, w, targets, b)
        assert counted.products == 0
        bounded = run(grads, h, w, targets, b, max_active_rows=3)
        for gradients in (got, bounded):
            for gradient, like in zip(gradients, (h, w, b), strict=True):
                assert gradient.shape == like.shape
                assert (gradient == 0).all()
    buffer = torch.ones(w.shape, device=DEVICE)
    run([zeros] * 3, h, w, y, main_grad=buffer)
    assert (buffer == 1).all()


@pytest.mark.parametrize("bound", [None, 0, 5])
def test_no_token(bound):
    h, w, y = make()
    empty = torch.empty(0, device=DEVICE)
    dhidden, dweight, _ = run([empty] * 3, h[:0], w, y[:0], max_active_rows=bound)
    assert dhidden.shape == (0, 16)
    assert (dweight == 0).all()


def test_strides():
    grads, h, w, y = gradients_of(39), *make()
    want = run(grads, h, w, y)
    strided = torch.stack([torch.stack(grads), torch.randn(3, 39).to(DEVICE)], 2)[..., 0]
    columns = h.T.contiguous().T, w.T.contiguous().T
    rows = torch.stack([h, h], 1)[:, 0], torch.stack([w, w], 1)[:, 1]
    targets = torch.stack([y, y], 1)[:, 0].to(torch.int32)
    for hidden, weight in (columns, rows):
        assert not hidden.is_contiguous()
        assert not weight.is_contiguous()
        got = run(list(strided), hidden, weight, targets)
        for a, b in zip(got[:2], want[:2], strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    expanded = h[:1].expand(39, -1)
    one = torch.tensor(1.0, device=DEVICE).expand(39)
    got, want = (run([one, one, one], x, w, y) for x in (expanded, expanded.contiguous()))
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0)


@infinities
@pytest.mark.parametrize("stored", [False, True], ids=["recomputed", "stored"])
def test_a_masked_vocabulary_has_no_gradient(stored):
    grads, h, w, y = gradients_of(39), *make()
    b = torch.zeros(w.shape[0], device=DEVICE)
    b[50:100] = -torch.inf
    y = torch.where((y >= 50) & (y < 100), 3, y)
    dhidden, dweight, dbias = run(grads, h, w, y, b, keep=stored)
    assert (dweight[50:100] == 0).all()
    assert (dbias[50:100] == 0).all()
    left = b == 0
    renumbered = torch.where(y == IGNORE, y, (left.cumsum(0) - 1)[y.clamp_min(0)])
    dense = (grads, h, w[left], renumbered, b[left])
    check((dhidden, dweight[left], dbias[left]), dense)


@infinities
def test_a_nan_reaches_what_it_has_a_part_in_and_no_other_row():
    grads, h, w, y = gradients_of(39), *make()
    y[4] = 2
    for broken in ("gradient", "hidden"):
        incoming = [g.clone() for g in grads]
        incoming[0][4] = torch.nan if broken == "gradient" else 1.0
        hidden = h.clone()
        if broken == "hidden":
            hidden[4, 3] = torch.inf
        dhidden, dweight, _ = run(incoming, hidden, w, y)
        assert dhidden[4].isnan().all()
        assert dweight.isnan().all()
        assert dhidden[torch.arange(39) != 4].isfinite().all()


@pytest.mark.parametrize(
    ("count", "element_size", "columns"),
    [(879, 2, 151936), (1638, 2, 76800), (8192, 2, 15360), (6554, 4, 9216), (1 << 20, 2, 1024)],
)
def test_chunks_are_as_few_as_the_room_for_dz_allows(count, element_size, columns, monkeypatch):
    monkeypatch.undo()
    assert launch._chunk_columns(count, 151936, element_size) == columns
    assert launch._chunk_columns(1, 301, element_size) == 304
    assert columns == 1024 or count * columns * element_size <= launch.DZ_BYTES


def test_a_dz_that_fits_is_one_chunk(monkeypatch):
    monkeypatch.undo()
    grads, h, w, y = gradients_of(39), *make((39, 16, 3000))
    with CountProducts(monkeypatch, products) as count:
        run(grads, h, w, y)
    assert count.calls == 2


def test_bad_options_say_what_came_and_what_was_wanted():
    grads, h, w, y = gradients_of(39), *make()
    buffer = torch.zeros(w.shape, device=DEVICE)
    bad = [
        ({"max_active_rows": -1}, ">= 0 or None; got -1"),
        ({"main_grad": buffer[:9]}, r"got .*9, 16"),
        ({"main_grad": buffer, "needs": (True, False, False)}, "needs no gradient"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            run(grads, h, w, y, **options)
