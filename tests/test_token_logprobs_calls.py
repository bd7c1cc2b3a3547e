"""`token_ids` as they are given: what they cost and hold, with other options, and with bad input.

T tokens, D hidden, V vocabulary, K ids asked for.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _rows
from entropy_kernels.testing import Watch, peaked_head
from tests.marks import nan_is_meant, sampled
from tests.token_cases import CALL_D as D
from tests.token_cases import CALL_V as V
from tests.token_cases import (
    FORMS,
    T,
    asked_for,
    backward_of,
    check,
    formula,
    gradients,
    logprobs,
    on,
    per_token,
    run,
)

pytestmark = [sampled(0.2), nan_is_meant]


@pytest.fixture(params=FORMS)
def asked(request):
    return asked_for(request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_do(tokens, form, impl, device):
    """No token at all, no id at all, or every token ignored."""
    for count in (0, 3):
        h = torch.randn(tokens, 8, device=device, requires_grad=True)
        w = torch.randn(33, 8, device=device, requires_grad=True)
        b = torch.randn(33, device=device, requires_grad=True)
        y = torch.full((tokens,), -100, device=device)
        ids = torch.arange(count, device=device)
        ids = per_token(ids, tokens) if form == "per token" else ids
        for options in ({}, {"max_active_rows": 0}, {"statistics": ("max_prob",)}):
            found = ek.linear_logprob_entropy(
                ek.Head(h, w, y, b), token_ids=ids, impl=impl, **options
            )
            assert found.token_logprobs.shape == (tokens, count)
            assert not found.token_logprobs.any()
            (found.logprob.sum() + found.token_logprobs.sum()).backward()
            assert not any(x.grad.any() for x in (h, w, b))


def test_leading_dimensions_strides_and_int32(asked, impl, device):
    h, w, y, ids = on(device, *asked)
    h, y = h[:36], y[:36]
    ids = ids if ids.ndim == 1 else ids[:36]
    incoming = gradients(ids, 36)
    far_w, far_ids = (torch.stack([x, x], -1)[..., 0] for x in (w, ids))
    shaped = far_ids if ids.ndim == 1 else far_ids.reshape(4, 9, -1)

    def flat(h, w):
        return logprobs(ek.Head(h, w, y), ids, impl=impl)

    def far(h, w):
        head = ek.Head(h.T.contiguous().T.reshape(4, 9, D), w, y.reshape(4, 9).int())
        return [x.flatten(0, 1) for x in logprobs(head, shaped.int(), impl=impl)]

    found = ek.linear_logprob_entropy(
        ek.Head(h.reshape(4, 9, D), w, y.reshape(4, 9)), token_ids=shaped, impl=impl
    )
    assert found._fields[-1] == "token_logprobs"
    assert found.token_logprobs.shape == (4, 9, ids.shape[-1])
    results = [run(f, (h, x), h.dtype, incoming, device) for f, x in ((flat, w), (far, far_w))]
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_same_bits_twice_and_in_a_retained_graph(asked, impl, device):
    h, w, y, ids = on(device, *asked)
    results = []
    for _ in range(2):
        x, weight = h.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()
        found = logprobs(ek.Head(x, weight, y, temperature=0.7), ids, impl=impl)
        loss = found[0].sum() + found[3].square().sum()
        for _ in range(2):
            grads = torch.autograd.grad(loss, (x, weight), retain_graph=True)
            results.append([*found, *grads])
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient(frozen, asked, impl, device):
    h, w, y, ids = asked
    leaves = {"hidden": h, "weight": w, "bias": torch.randn(V)}
    results = []
    for dtype, where in ((torch.float32, device), (torch.float64, "cpu")):
        own = {
            name: x.to(where, dtype).detach().requires_grad_(name != frozen)
            for name, x in leaves.items()
        }
        head = ek.Head(own["hidden"], own["weight"], y.to(where), own["bias"])
        found = formula(head, ids) if where == "cpu" and dtype == torch.float64 else None
        found = found or logprobs(head, ids.to(where), impl=impl)
        sum(x.sum() for x in found).backward()
        results.append({name: x.grad for name, x in own.items()})
    assert results[0].pop(frozen) is None
    for name, x in results[0].items():
        torch.testing.assert_close(x.cpu().double(), results[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_backward_costs_its_rows_alone(share, asked, impl, device):
    """3 products with the vocabulary per row with a gradient, and those with its ids."""
    h, w, y, ids = asked
    # All gradients count in fp32: nothing is left out as 0.
    h, w, y, ids = on(device, h / 30, w, y.clone(), ids)
    y[::7] = -100
    h.requires_grad_(), w.requires_grad_()
    with Watch() as forward:
        found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    count, valid = ids.shape[-1], y >= 0
    with Watch() as alone:
        ek.linear_logprob_entropy(ek.Head(h.detach(), w.detach(), y), impl=impl)
    rows = T if ids.ndim == 1 else int(valid.sum())
    assert forward.products == alone.products + rows * count * D
    generator = torch.Generator().manual_seed(0)
    active = (torch.rand(T, generator=generator) < share).to(device)
    products = backward_of(ids, found, active)
    rows = int((active & valid).sum())
    assert (share == 0) == (rows == 0)
    if ids.ndim == 1:
        assert products == rows * (3 * V + 2 * count) * D
    else:
        # The likeliest of a row's ids, repeats included, is the vocabulary's part.
        best = found.token_logprobs.argmax(1, keepdim=True)
        others = (ids != ids.gather(1, best)).sum(1)
        assert products == (rows * 3 * V + 2 * int(others[active & valid].sum())) * D
    assert torch.equal(h.grad.any(1), active & valid)


def test_a_log_ratio_costs_its_ids_alone(impl, device):
    """Where gradients add up to nothing, no product with the vocabulary is run."""
    h, w, y = on(device, *peaked_head(T, D, V))
    ids = torch.stack([y, (y + 1) % V], 1)
    h.requires_grad_(), w.requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    first, second = found.token_logprobs.unbind(1)
    with Watch() as watch:
        (first - second).sum().backward()
    assert watch.products == 2 * 2 * T * D


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_holds_no_logits(impl, form):
    # Blocks of the torch path have 512 x 1024 logits.
    tokens, vocabulary = 1030, 4099
    h, w, y = torch.randn(tokens, 8), torch.randn(vocabulary, 8), torch.arange(tokens)
    ids = torch.arange(40)
    ids = per_token(ids, tokens) if form == "per token" else ids
    h.requires_grad_(), w.requires_grad_()
    with Watch() as watch:
        outputs = logprobs(ek.Head(h, w, y), ids, impl=impl)
        sum(x.sum() for x in outputs).backward()
    assert watch.largest < tokens * vocabulary // 4


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_weights_gradient(buffer, asked, impl, device):
    """Added to what is there in fp32, and rounded once."""
    h, w, y, ids = on(device, *asked)
    h, w = h.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()

    def loss(**options):
        found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl, **options)
        return (found.token_logprobs.sum(1) - 0.5 * found.entropy)[:20].sum()

    loss().backward()
    want, dh = w.grad.clone(), h.grad.clone()
    w.grad = h.grad = None
    main_grad = torch.zeros_like(w, dtype=buffer)
    total = loss(main_grad=main_grad)
    total.backward(retain_graph=True)
    assert w.grad is None
    assert torch.equal(h.grad, dh)
    assert torch.equal(main_grad.bfloat16(), want)
    once = main_grad.clone()
    total.backward()
    torch.testing.assert_close(main_grad, 2 * once, rtol=2**-8, atol=0)


@pytest.mark.parametrize("option", ["keep_logits", "keep_logits_above"])
def test_stored_logits_change_the_cost_alone(option, asked, impl, device):
    h, w, y, ids = asked
    arguments = {option: {"keep_logits": True, "keep_logits_above": 0.1}[option]}
    check((h, w, None), y, ids, gradients(ids), impl, device, arguments, temperature=0.8)
    check((h.bfloat16(), w.bfloat16(), None), y, ids, gradients(ids), impl, device, arguments)


def test_statistics_are_those_without_ids(asked, impl, device):
    h, w, y, ids = on(device, *asked)
    names = _rows.filled(impl)
    found, want = (
        ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=names, impl=impl, **options)
        for options in ({"token_ids": ids}, {})
    )
    assert want.token_logprobs is None
    for name in names:
        assert torch.equal(getattr(found, name), getattr(want, name))
        assert not getattr(found, name).requires_grad


@pytest.mark.parametrize("most", [11, 20, 100])
def test_a_bound_of_the_active_rows(most, asked, impl, device):
    h, w, y, ids = on(device, *asked)
    active = torch.arange(T, device=device) % 4 == 0
    rows = int(active.sum())
    h[~active] = torch.nan
    results = []
    for bound in (None, most):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        found = ek.linear_logprob_entropy(
            ek.Head(x, weight, y), token_ids=ids, max_active_rows=bound, impl=impl
        )
        found.token_logprobs[active].sum().backward()
        results.append((x.grad, weight.grad))
    assert rows <= most
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_autocast_casts_as_linear(asked):
    h, w, y, ids = asked
    incoming = gradients(ids)

    def function(h, w):
        return logprobs(ek.Head(h, w, y), ids)

    def cast(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return function(h, w)

    wanted = run(function, (h, w), torch.bfloat16, incoming)
    for got, want in zip(run(cast, (h, w), torch.float32, incoming), wanted, strict=True):
        assert torch.equal(got, want.float())


# Where a graph ends dynamo looks at the gradients of what it hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_runs_around_it(asked, unchecked_shapes):
    h, w, y, ids = asked
    incoming = gradients(ids)

    def function(h, w):
        return logprobs(ek.Head(2 * h, w, y), ids)

    compiled = torch.compile(function, backend="aot_eager")
    got, wanted = (run(f, (h, w), torch.float32, incoming) for f in (compiled, function))
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, want)


def test_the_specification_takes_fp64(asked):
    h, w, y, ids = asked
    head = ek.Head(h.double(), w.double(), y, temperature=0.5, softcap=7.0)
    found = ek.linear_logprob_entropy(head, token_ids=ids, impl="reference")
    z = 7.0 * torch.tanh(h.double() @ w.double().T / 7.0) / 0.5
    wanted = z.log_softmax(1)[torch.arange(T)[:, None], ids]
    assert found.token_logprobs.dtype == torch.float64
    torch.testing.assert_close(found.token_logprobs, wanted, rtol=1e-12, atol=1e-12)
