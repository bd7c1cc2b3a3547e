"""Logits of rows above a threshold, stored by Triton's forward and read by its backward.

T tokens, C compact rows, D hidden, V vocabulary.
"""

import sys
from itertools import cycle

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import backends, device
from entropy_kernels._bounds import assert_within_two_bounds
from entropy_kernels._triton.head_backward import launch, launch_rows
from entropy_kernels._triton.head_backward.launch import backward
from entropy_kernels._triton.head_forward import launch_store, launch_variants
from entropy_kernels._triton.head_forward.launch import forward
from entropy_kernels.head import Head
from entropy_kernels.testing import Watch
from tests.backward_cases import (
    DEVICE,
    IGNORE,
    OPTIONS,
    active,
    active_numbers,
    allowed,
    gradients_of,
    make,
    options_of,
    three_of,
    tiles_here,
)
from tests.host_waits import HostWaits
from tests.loss_cases import policy_loss
from tests.marks import sampled

pytestmark = sampled(0.2)

T, D, V = SHAPE = (75, 8, 100)
# The module, whose name in the package is the function's.
loss = sys.modules["entropy_kernels.high_entropy_policy_loss"]
ROWS = {"all": (0.0, T), "none": (100.0, 9), "some": (0.1, T), "too many": (0.0, 50)}
# NumPy computes in the interpreter, and warns of the infinities and NaN that these tests need.
infinities = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several chunks of rows and of columns, and blocks of rows."""
    monkeypatch.setattr(launch, "CHUNK_V", 64)
    monkeypatch.setattr(launch, "DZ_BYTES", 0)
    monkeypatch.setattr(launch_variants, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(launch_variants, "WORKSPACE_BLOCK", 32)
    for module in (launch_store, launch_rows):
        monkeypatch.setattr(module, "BLOCK", 16)
    if device.interpreting():
        monkeypatch.setattr(launch_rows, "STEP", 32)


def store(above, rows, h, w, y, b=None, temperature=None, softcap=None):
    """Forward."""
    above = torch.as_tensor(above, dtype=torch.float32, device=DEVICE)
    head = Head(h, w, y, b, temperature, softcap, IGNORE)
    return forward(head, keep_logits=False, store_above=above, store_rows=rows)


def back(found, grads, h, w, y, b=None, temperature=None, softcap=None, **kwargs):
    needs = kwargs.pop("needs", (True, True, b is not None))
    head = Head(h, w, y, b, temperature, softcap, IGNORE)
    return backward(tuple(grads), head, found, needs, **kwargs)


def check(got, inputs, found, bound=None, tile=None, **options):
    """Each row of hidden's gradient has the bits that it has with all rows stored, or with none.

    The other gradients are within both bounds. Where rows are recomputed by sums of another order
    than forward's, the error of the same forward without stored rows is allowed too.
    """
    grads, *head = inputs
    head = (*head, *(options.get(name) for name in ("b", "temperature", "softcap")))
    stored, recomputed = (
        back(
            forward(Head(*head, IGNORE), keep_logits=keep, variant="cublas"),
            grads,
            *head,
            max_active_rows=bound,
            tile=tile,
        )
        for keep in (True, False)
    )
    numbers = active_numbers(grads, head[2])
    places = found.places[numbers]
    front = len(numbers)
    if (places < 0).any():
        front = int((places < 0).nonzero()[0]) // launch_rows.STEP * launch_rows.STEP
    assert torch.equal(got[0][numbers[:front]], stored[0][numbers[:front]])
    assert torch.equal(got[0][numbers[front:]], recomputed[0][numbers[front:]])
    dtype = head[0].dtype
    truth, *others = three_of(*inputs, **options)
    got, recomputed = ([x for x in found if x is not None] for found in (got, recomputed))
    more = allowed(truth, *head[:2], **options)
    for result, true, *pair, other, allowance in zip(
        got, truth, *others, recomputed, more, strict=True
    ):
        errors = [(x.double() - true).abs().max() for x in (*pair, other)]
        if front < len(numbers):
            pair = [x if e > errors[2] else other for x, e in zip(pair, errors[:2], strict=True)]
        assert_within_two_bounds(result, true, *pair, operands=dtype, allowance=allowance)


def at_rows(rows) -> list:
    """Gradients of all three outputs at these rows alone."""
    grads = [torch.zeros(T, device=DEVICE) for _ in range(3)]
    for grad in grads:
        grad[rows] = torch.randn(len(rows), device=DEVICE)
    return grads


@pytest.mark.parametrize(("above", "rows"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_stores_the_first_rows_above_the_threshold(above, rows, dtype, monkeypatch):
    monkeypatch.setattr(launch_store, "COPY_V", 64)
    monkeypatch.setattr(launch_store, "COPY_BLOCK_V", 32)
    h, w, y = make(SHAPE, dtype)
    b = torch.randn(V, device=DEVICE).to(dtype)
    temperature = torch.rand(T, device=DEVICE) + 0.5
    head = (h, w, y, b, temperature, 5.0)
    plain = forward(Head(*head, IGNORE), keep_logits=True, variant="cublas")
    found = store(above, rows, *head)
    torch.testing.assert_close(found[:5], plain[:5], rtol=0, atol=0)
    wanted = ((plain.entropy >= above) & (y != IGNORE)).nonzero().squeeze(1)[:rows]
    places = torch.full((T,), -1, device=DEVICE)
    places[wanted] = torch.arange(len(wanted), device=DEVICE)
    assert found.places.tolist() == places.tolist()
    assert found.logits.shape == (rows, V)
    assert torch.equal(found.logits[: len(wanted)], plain.logits[wanted])


@infinities
def test_an_entropy_of_exactly_the_threshold_is_above_it_and_a_nan_is_not():
    h, w, y = make(SHAPE)
    y[:] = 3
    h[7] = torch.nan
    entropy = store(0.0, T, h, w, y).entropy
    for above in (entropy[20], entropy[33].item()):
        found = store(above, T, h, w, y)
        assert (found.places >= 0).tolist() == (entropy >= above).tolist()
    assert found.places[7] == -1
    assert (store(torch.nan, T, h, w, y).places == -1).all()


@pytest.mark.parametrize(
    ("above", "rows", "dtype", "bounded"),
    [
        *((*ROWS[name], torch.float32, True) for name in ("all", "none", "some", "too many")),
        *((*ROWS[name], torch.float32, False) for name in ("some", "too many")),
        (*ROWS["too many"], torch.float16, True),
    ],
    ids=[*ROWS, "some, counted", "too many, counted", "too many, fp16"],
)
def test_gradients_at_rows_stored_and_not_stored(above, rows, dtype, bounded):
    inputs = (gradients_of(T), *make(SHAPE, dtype))
    bound = active(inputs[0], inputs[3]) + 9 if bounded else None
    found = store(above, rows, *inputs[1:])
    check(back(found, *inputs, max_active_rows=bound), inputs, found, bound)


# Each option with one tile after the other, all together with every tile.
@pytest.mark.parametrize(
    ("names", "tile", "bounded"),
    [
        *zip(
            [OPTIONS[name] for name in ("bias", "temperature", "softcap")],
            cycle(tiles_here()),
            cycle([True, False]),
        ),
        *zip(cycle([OPTIONS["all"]]), tiles_here(), cycle([False, True])),
    ],
)
def test_options_with_the_first_rows_stored(tile, names, bounded):
    """All logits but the last rows' fit: backward reads those, and recomputes the last rows."""
    inputs = (gradients_of(T), *make(SHAPE))
    options = options_of(inputs[1:], **names)
    number = active(inputs[0], inputs[3])
    found = store(0.0, 60, *inputs[1:], **options)
    first = active_numbers(inputs[0], inputs[3])
    front = int((found.places[first] >= 0).sum())
    assert 32 < front < number
    bound = number + 9 if bounded else None
    got = back(found, *inputs, **options, tile=tile, max_active_rows=bound)
    check(got, inputs, found, bound, tile, **options)


@pytest.mark.parametrize("bounded", [False, True], ids=["counted", "bounded"])
def test_rows_that_are_read_are_not_recomputed(bounded):
    """With another weight in backward, what is recomputed is NaN, and what is read is not."""
    h, w, y = make(SHAPE)
    b = torch.zeros(V, device=DEVICE)
    found = store(0.1, T, h, w, y, b)
    above = (found.places >= 0).nonzero().squeeze(1)
    below = ((found.places < 0) & (y != IGNORE)).nonzero().squeeze(1)
    bound = T if bounded else None
    options = {"needs": (False, True, True), "max_active_rows": bound}
    grads = at_rows(above)
    everything = back(found, grads, h, w, y, b, max_active_rows=bound)
    check(everything, (grads, h, w, y), found, bound, b=b)
    want = back(found, grads, h, w, y, b, **options)
    got = back(found, grads, h, torch.full_like(w, torch.nan), y, b, **options)
    for x, wanted in zip(got[1:], want[1:], strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, wanted)
    grads[1][below[0]] = 1.0
    got = back(found, grads, h, torch.full_like(w, torch.nan), y, b, **options)
    assert got[1].isnan().any()
    got = back(found, grads, h, w, y, b, max_active_rows=bound)
    check(got, (grads, h, w, y), found, bound, b=b)


@infinities
@pytest.mark.parametrize("bound", [0, 1, "one too few"])
def test_more_active_rows_than_the_bound_are_never_silent(bound):
    grads, h, w, y = gradients_of(T), *make(SHAPE)
    b = torch.zeros(V, device=DEVICE)
    bound = active(grads, y) - 1 if isinstance(bound, str) else bound
    found = store(0.0, max(bound, 1), h, w, y, b)
    for gradient in back(found, grads, h, w, y, b, max_active_rows=bound):
        assert gradient.isnan().all()


@pytest.mark.parametrize("spare", [0, 9])
def test_a_bound_makes_the_host_wait_for_nothing(spare, monkeypatch):
    grads, h, w, y = gradients_of(T), *make(SHAPE)
    bound = active(grads, y) + spare
    above = torch.tensor(0.1, device=DEVICE)

    def fail(self):
        raise AssertionError("the host waits for a tensor's numbers")

    with monkeypatch.context() as patch, HostWaits(on=DEVICE) as waits:
        patch.setattr(torch.Tensor, "tolist", fail)
        found = store(above, bound, h, w, y)
        got = back(found, grads, h, w, y, max_active_rows=bound)
        assert not waits.found
        with pytest.raises(AssertionError, match="the host waits"):
            back(store(above, 9, h, w, y), grads, h, w, y)
    check(got, (grads, h, w, y), found, bound)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 75])
@pytest.mark.parametrize("gap", [None, 0, 16, 32, 50])
def test_the_front_ends_at_the_first_row_without_logits(count, gap):
    index_C = torch.arange(0, 2 * 80, 2, dtype=torch.int32, device=DEVICE)
    places_T = torch.arange(160, 0, -1, dtype=torch.int32, device=DEVICE)
    if gap is not None:
        places_T[2 * gap] = places_T[2 * gap + 20] = -1
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    found = launch_rows.stored_rows(index_C, number, places_T)
    broken = gap is not None and gap < count
    assert found.number.item() == (gap // launch_rows.STEP * launch_rows.STEP if broken else count)
    assert found.place[:count].tolist() == places_T[index_C[:count].long()].tolist()


def test_the_same_bits_twice():
    inputs = (gradients_of(T), *make(SHAPE, torch.bfloat16))
    options = options_of(inputs[1:], **OPTIONS["all"])
    first, second = (back(store(0.0, 60, *inputs[1:], **options), *inputs, **options) for _ in "ab")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_only_chunks_of_products_store_rows():
    h, w, y = make(SHAPE)
    above = torch.zeros((), device=DEVICE)
    head = Head(h, w, y, None, None, None, IGNORE)
    options = {"keep_logits": False, "store_above": above, "store_rows": 9}
    with pytest.raises(ValueError, match="variant must be one of"):
        forward(head, **options, variant="pointer")
    with pytest.raises(ValueError, match="store_above needs the variant \"cublas\"; got 'pointer'"):
        forward(head, **options, tile=tiles_here()[0])


def loss_and_gradients(h, w, y, **options):
    """The loss and its gradients."""
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    mask = torch.arange(T, device=DEVICE) % 5 > 0
    advantage = torch.where(torch.arange(T, device=DEVICE) % 3 > 0, 1.0, -0.5)
    loss, metrics = policy_loss(
        h, w, y.clamp_min(0), None, advantage, mask, impl="triton", **options
    )
    loss.backward()
    return (loss.detach(), h.grad, w.grad), metrics


@pytest.mark.parametrize("room", [1.0, 0.5, 0.0], ids=["all fit", "half fit", "none fits"])
def test_a_known_threshold_costs_two_products_of_the_rows_above_it(room, monkeypatch):
    """1 + 2f in units of T V D; each row that does not fit costs one more product.

    Only cuBLAS stores rows, and it multiplies those without a target too.
    """
    inputs = make(SHAPE)
    want, metrics = loss_and_gradients(*inputs, fraction=0.8)
    threshold, selected = metrics["entropy/threshold"], int(metrics["tokens/selected"])
    fitting = int(room * selected)
    bytes_of = dict.fromkeys(("cpu", "cuda"), 4 * V * fitting)
    monkeypatch.setattr(backends, "STORED_LOGITS_BYTES", bytes_of)
    with Watch() as watch:
        got, found = loss_and_gradients(*inputs, threshold=threshold)
    assert found["tokens/selected"] == selected == found["head/active_rows"]
    read = selected if room == 1 else fitting // launch_rows.STEP * launch_rows.STEP
    multiplied = T if fitting else int((torch.arange(T) % 5 > 0).sum())
    assert watch.products == (multiplied + 3 * selected - read) * V * D
    bounded, _ = loss_and_gradients(*inputs, threshold=threshold, max_active_rows=selected)
    for result in (got, bounded):
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounded", [False, True], ids=["counted", "bounded"])
@pytest.mark.parametrize("room", [1.0, 0.7, 0.0], ids=["all fit", "some fit", "none fits"])
def test_of_a_known_selection_the_rows_that_do_not_fit_alone_are_recomputed(
    room, bounded, monkeypatch
):
    """3 products of the selected rows, and a fourth of those that do not fit."""
    monkeypatch.setattr(loss, "LEAST_ROW_BYTES", {"cpu": 0, "cuda": 0})
    inputs = make(SHAPE)
    selected = torch.arange(T, device=DEVICE) % 5 > 0
    want, metrics = loss_and_gradients(*inputs, selected=selected)
    count = int(metrics["tokens/selected"])
    fitting = int(room * count)
    bytes_of = dict.fromkeys(("cpu", "cuda"), 4 * V * fitting)
    monkeypatch.setattr(backends, "STORED_LOGITS_BYTES", bytes_of)
    bound = {"max_active_rows": count} if bounded else {}
    with Watch() as watch:
        got, _ = loss_and_gradients(*inputs, selected=selected, **bound)
    read = count if room == 1 else fitting // launch_rows.STEP * launch_rows.STEP
    assert watch.products == (4 * count - read) * V * D
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_without_a_backward_nothing_is_stored(monkeypatch):
    h, w, y = make(SHAPE)
    asked = []
    monkeypatch.setattr(backends, "stores_rows", lambda *shape: asked.append(shape) or False)
    options = {"keep_logits_above": 0.1, "impl": "triton"}
    with torch.no_grad():
        ek.linear_logprob_entropy(ek.Head(h, w, y), **options)
    assert asked == []
    with Watch() as watch:
        found = ek.linear_logprob_entropy(ek.Head(h, w.requires_grad_(), y), **options)
        found.logprob[(y != IGNORE) & (found.entropy >= 0.1)].sum().backward()
    assert asked == [(h.device, h.dtype, D, ("stored", "odd V"))]
    rows = int(((y != IGNORE) & (found.entropy >= 0.1)).sum())
    assert watch.products == (int((y != IGNORE).sum()) + 2 * rows) * V * D
