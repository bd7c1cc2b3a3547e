"""`support`: log-probs, entropies, statistics and gradients over sets, against fp64 autograd
through logits that are -inf outside of them.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _rows
from entropy_kernels.testing import Watch
from entropy_kernels.verification.truth import ROWS
from tests.head_cases import DTYPES, make, numbers
from tests.marks import nan_is_meant, not_interpreted, sampled
from tests.support_cases import check, make_sets, masked, random_sets, unsorted

pytestmark = [sampled(0.2), nan_is_meant]


@pytest.fixture
def shape(impl, device):
    """Small in Triton's interpreter, which takes ms for each few pairs."""
    return (19, 20, 23) if impl == "triton" and device == "cpu" else (67, 40, 135)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_kind(head, rows, dtype, device, shape):
    inputs, kept = make_sets(rows, shape, dtype, device)
    check(head, (*inputs, None), kept)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"temperature": 0.7},
        {"temperature": "per token", "ignore": True},
        {"softcap": 5.0},
        {"logit_scale": 0.25},
        {"bias": True, "temperature": "per token", "softcap": 5.0, "ignore": True},
        {"bias": True, "temperature": "per token", "softcap": 5.0, "logit_scale": 2.5},
    ],
    ids=lambda o: "+".join(o),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(head, options, dtype, device, shape):
    (h, w, y), kept = make_sets("peaked", shape, dtype, device)
    options = dict(options)
    b = torch.randn(len(w), device=device).to(dtype) if options.pop("bias", False) else None
    if options.pop("ignore", False):
        y[::3] = -1
        kept[::6] = False
        options["ignore_index"] = -1
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(len(y), device=device) + 0.5
    outputs, gradients = check(head, (h, w, y, b), kept, **options)
    if "ignore_index" in options:
        assert not any(x[y == -1].any() for x in outputs)
        assert not gradients[0][y == -1].any()


@not_interpreted
def test_100000_sets(head, device):
    T, D, V = 100_000, 4, 31
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(V, (T,), generator=generator).to(device)
    h, w = (2 * torch.randn(n, D, generator=generator).to(device) for n in (T, V))
    kept = random_sets(y, V)
    assert set(kept.sum(1).tolist()) >= {*range(1, 25), V}
    check(head, (h, w, y, None), kept, orders=2)


def test_full_sets_are_the_whole_vocabulary(head, impl, device, shape):
    h, w, y = make("peaked", shape, torch.float32, device)
    everything = unsorted(torch.ones(shape[0], shape[2], dtype=torch.bool, device=device))
    results = []
    for options in ({}, {"support": everything}):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        found = head(x, weight, y, statistics=_rows.OF_SETS, **options)
        (found.logprob - 0.5 * found.entropy).sum().backward()
        outputs = found._replace(logsumexp=None)
        results.append([*(z for z in outputs if z is not None), x.grad, weight.grad])
    for over_sets, dense in zip(*results, strict=True):
        torch.testing.assert_close(over_sets, dense, rtol=1e-4, atol=1e-5)


def test_the_specification_masks_logits(device, shape):
    (h, w, y), kept = make_sets("peaked", shape, torch.float64, device)
    head = ek.Head(h, w, y, temperature=0.5)
    found = ek.linear_logprob_entropy(
        head, support=unsorted(kept), statistics=_rows.OF_SETS, impl="reference"
    )
    want = masked(torch.float64, h, w, y, kept, temperature=0.5)
    for got, wanted in zip(numbers(found), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


def test_a_set_of_one_is_certain_and_costs_nothing(head, device, shape):
    h, w, y = make("peaked", shape, torch.float32, device)
    h[::2] = torch.nan
    h.requires_grad_(), w.requires_grad_()
    support = ek.Support(y, torch.arange(shape[0] + 1, device=device))
    with Watch() as watch:
        found = head(h, w, y, support=support, statistics=_rows.OF_SETS)
        (found.logprob - found.entropy).sum().backward()
    assert watch.products == 0
    for x, want in zip(numbers(found), (0, 0, 0, 1, 1, 0), strict=True):
        assert (x == want).all()
    assert found.is_top1.all()
    assert not h.grad.any()
    assert not w.grad.any()


def test_is_top1_is_the_lowest_id_of_equals(head, device):
    """In whatever order the ids of a set come; words outside of it have larger logits."""
    w = torch.zeros(40, 2, device=device)
    w[[7, 20, 31], 0], w[3, 0], w[:, 1] = 1.0, 9.0, -1.0
    sets = [[31, 7, 5, 20], [5, 20, 31, 7], [20, 7], [31, 20, 9], [20, 9], [31], [9, 31, 3]]
    y = torch.tensor([7, 20, 7, 20, 9, 31, 31], device=device)
    h = torch.tensor([[1.0, 0.0]] * 7, device=device)
    found = head(h, w, y, support=ek.Support.of(sets, device), statistics=("is_top1",))
    assert found.is_top1.tolist() == [True, False, True, True, False, True, False]


@pytest.mark.parametrize("names", [("mean_logit",), ("max_prob", "mean_logit")])
def test_sets_have_no_mean_logit(head, names, device, shape):
    (h, w, y), kept = make_sets("peaked", shape, torch.float32, device)
    with pytest.raises(ValueError, match="is_top1; got mean_logit: sets of one form no logit"):
        head(h, w, y, support=unsorted(kept), statistics=names)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_do(head, tokens, device):
    """No token at all, or every token ignored, with an empty set."""
    h = torch.randn(tokens, 8, device=device, requires_grad=True)
    w = torch.randn(33, 8, device=device, requires_grad=True)
    b = torch.randn(33, device=device, requires_grad=True)
    support = ek.Support.of([[]] * tokens, device)
    y = torch.full((tokens,), -100, device=device)
    for options in ({}, {"max_active_rows": 0}, {"statistics": _rows.OF_SETS}):
        found = head(h, w, y, bias=b, support=support, **options)
        assert all(x is None or (x.shape == (tokens,) and not x.any()) for x in found)
        (found.logprob + found.entropy).sum().backward()
        assert not any(x.grad.any() for x in (h, w, b))


def test_entropies_keep_their_digits_down_to_1e_12(head, device):
    """Two words of five, g nats apart, s = exp(-g): in closed form."""
    support = ek.Support(*(torch.tensor(x, device=device) for x in ([3, 1], [0, 2])))
    one = torch.ones(1, 1, device=device)
    for gap in (0.5, 5.0, 15.0, 30.0):
        z = torch.tensor([[9.0], [-gap], [9.0], [0.0], [9.0]], device=device)
        s = torch.tensor(-gap, dtype=torch.float64).exp()
        found = head(one, z, torch.tensor([3], device=device), support=support)
        wanted = {"logprob": -s.log1p(), "entropy": s.log1p() + gap * s / (1 + s)}
        for name, want in wanted.items():
            got = getattr(found, name).double().cpu()
            assert (got - want).abs() <= 2e-7 * want.abs(), (name, gap)


@pytest.mark.parametrize("used", ["logprob", "entropy"])
@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight", "bias"])
def test_each_output_alone_and_what_is_frozen(head, used, frozen, device, shape):
    (h, w, y), kept = make_sets("peaked", shape, torch.float32, device)
    leaves = {"hidden": h, "weight": w, "bias": torch.randn(len(w), device=device)}
    for name, x in leaves.items():
        x.requires_grad_(name != frozen)
    found = head(h, w, y, bias=leaves["bias"], support=unsorted(kept))
    getattr(found, used).sum().backward()
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    want = masked(torch.float64, exact["hidden"], exact["weight"], y, kept, exact["bias"])
    want[("logprob", "entropy").index(used)].sum().backward()
    for name, x in leaves.items():
        assert (x.grad is not None) == (name != frozen)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, exact[name].grad.float(), rtol=1e-4, atol=1e-5)


def test_the_weights_gradient_is_zero_outside_of_the_sets(head, device):
    (h, w, y), kept = make_sets("peaked", (9, 16, 31), torch.float32, device)
    kept[:, 25:] = False
    y.remainder_(25)
    kept[torch.arange(9), y] = True
    w.requires_grad_()
    found = head(h, w, y, support=unsorted(kept))
    found.entropy.sum().backward()
    inside = (kept & (kept.sum(1, keepdim=True) > 1)).any(0)
    assert torch.equal(w.grad.any(1), inside)


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_weights_gradient(head, buffer, device, shape):
    (h, w, y), kept = make_sets("peaked", shape, torch.bfloat16, device)
    h.requires_grad_(), w.requires_grad_()
    head(h, w, y, support=unsorted(kept)).logprob[:40].sum().backward()
    want, dh = w.grad.clone(), h.grad.clone()
    w.grad = h.grad = None
    main_grad = torch.zeros_like(w, dtype=buffer)
    loss = head(h, w, y, support=unsorted(kept), main_grad=main_grad).logprob[:40].sum()
    loss.backward(retain_graph=True)
    assert w.grad is None
    assert torch.equal(h.grad, dh)
    assert torch.equal(main_grad.bfloat16(), want)
    once = main_grad.clone()
    loss.backward()
    torch.testing.assert_close(main_grad, 2 * once, rtol=2**-8, atol=0)


def test_the_same_bits_twice_and_in_a_retained_graph(head, device, shape):
    (h, w, y), kept = make_sets("peaked", shape, torch.bfloat16, device)
    results = []
    for _ in range(2):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        found = head(x, weight, y, support=unsorted(kept))
        loss = (found.logprob + found.entropy).sum()
        for _ in range(2):
            grads = torch.autograd.grad(loss, (x, weight), retain_graph=True)
            results.append([*found[:2], *grads])
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_leading_dimensions_strides_and_int32(head, device):
    (h, w, y), kept = make_sets("peaked", (24, 16, 31), torch.float32, device)
    support = unsorted(kept)
    flat = head(h, w, y, support=support)
    strided_h = h.T.contiguous().T.reshape(2, 3, 4, 16)
    strided_w = torch.stack([w, w], dim=1)[:, 0]
    assert not strided_w.is_contiguous()
    strided_ids = torch.stack([support.token_ids.int()] * 2, dim=1)[:, 0]
    other = ek.Support(strided_ids, support.offsets.int())
    strided_h.requires_grad_(), strided_w.requires_grad_()
    found = head(strided_h, strided_w, y.reshape(2, 3, 4).int(), support=other)
    for got, want in zip(found[:2], flat[:2], strict=True):
        assert got.shape == (2, 3, 4)
        assert torch.equal(got.flatten(), want)
    h.requires_grad_(), w.requires_grad_()
    grads = [
        torch.autograd.grad(head(*given, support=s).logprob.sum(), given[:2])
        for given, s in (((h, w, y), support), ((strided_h, strided_w, y.reshape(2, 3, 4)), other))
    ]
    assert torch.equal(grads[1][0].reshape(24, 16), grads[0][0])
    assert torch.equal(grads[1][1], grads[0][1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_poisons_itself_and_its_columns_alone(head, value, device):
    (h, w, y), kept = make_sets("peaked", (9, 16, 31), torch.float32, device)
    kept[4] = False
    kept[4, [int(y[4]), 3, 5]] = True
    clean = head(h, w, y, support=unsorted(kept))
    h[4, 3] = value
    w[:, 3] = w[:, 3].abs() + 1
    h.requires_grad_(), w.requires_grad_()
    found = head(h, w, y, support=unsorted(kept), statistics=_rows.OF_SETS)
    assert clean.logprob.isfinite().all()
    for x in numbers(found):
        assert x.isnan().nonzero().flatten().tolist() == [4]
    assert not found.is_top1[4]
    (found.logprob + found.entropy).sum().backward()
    assert h.grad.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert torch.equal(w.grad.isnan().any(1), kept[4])


def test_masked_words_within_a_set_are_legal(head, device, shape):
    """-inf logits have probability 0, no part in the entropy, and no gradient."""
    (h, w, y), kept = make_sets("peaked", shape, torch.float32, device)
    b = torch.zeros(shape[2], device=device)
    b[7:15] = -torch.inf
    y = torch.where((y >= 7) & (y < 15), 3, y)
    kept[torch.arange(shape[0]), y] = True
    kept[5] = False
    kept[5, [8, 9]] = True
    y[5] = 8
    others = torch.arange(shape[0], device=device) != 5
    w.requires_grad_(), h.requires_grad_()
    found = head(h, w, y, bias=b, support=unsorted(kept))
    less = head(h, w, y.where(others, -100), support=unsorted(kept & (b == 0)))
    (found.logprob + found.entropy)[others].sum().backward()
    for got, want in zip(found[:2], less[:2], strict=True):
        assert got[5].isnan()
        assert torch.equal(got[others], want[others])
    assert w.grad.isfinite().all()
    assert not w.grad[7:15].any()
    masked_target = head(
        h[:1],
        w,
        torch.full_like(y[:1], 8),
        bias=b,
        support=ek.Support.of([[8, 3]], device),
    )
    assert masked_target.logprob == -torch.inf
    assert masked_target.entropy == 0
