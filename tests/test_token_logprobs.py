"""Log-probabilities of chosen ids: truth is the reference in fp64, bounds those of all logits.

T tokens, D hidden, V vocabulary, K ids asked for.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.testing import peaked_head
from tests.marks import nan_is_meant, sampled
from tests.token_cases import (
    DTYPES,
    OUTPUTS,
    D,
    T,
    V,
    check,
    gradients,
    logprobs,
    of_the_rows,
    per_token,
    run,
)

pytestmark = [sampled(0.2), nan_is_meant]


@pytest.fixture(params=["shared", "per token"])
def form(request):
    """Makes ids that all rows share what is asked for: themselves, or the same ids per token."""
    return per_token if request.param == "per token" else lambda ids, tokens=T: ids


def spread(h, w, y):
    """Each row's likeliest word, its target, and words of no weight."""
    best = (h.float() @ w.float().T).argmax(1)
    return torch.cat([best[:9], y[:9].clamp_min(0), torch.tensor([0, V - 1])])


CASES = {
    "one": lambda h, w, y: y[1:2].clone(),
    "none": lambda h, w, y: y[:0],
    "likely, targets, rare, repeated": spread,
    "each twice": lambda h, w, y: torch.arange(2 * V) % V,
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(("likely, targets, rare, repeated", dtype) for dtype in DTYPES),
        *(("one", "fp16"), ("none", "fp32"), ("each twice", "bf16")),
    ],
)
def test_outputs_and_gradients(case, dtype, form, impl, device):
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    ids = form(CASES[case](h, w, y))
    y[::7] = -100
    check((h, w, None), y, ids, gradients(ids), impl, device, temperature=0.8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["bias", "softcap", "all"])
def test_what_forms_the_logits(options, dtype, form, impl, device):
    """In the gradients too: a bias has one, a softcap has a slope at each id."""
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(V, generator=generator).to(h.dtype) if options != "softcap" else None
    of_head = {} if options == "bias" else {"softcap": 6.0}
    if options == "all":
        temperature = torch.rand(T, generator=generator) + 0.5
        of_head |= {"temperature": temperature, "logit_scale": 0.7, "ignore_index": int(y[3])}
    ids = of_the_rows(h, w, y) if form is per_token else spread(h, w, y)
    check((h, w, b), y, ids, gradients(ids), impl, device, **of_head)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_each_token(dtype, impl, device):
    """Each row's likeliest ids, its target and others; gradients at about half of them."""
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    ids = of_the_rows(h, w, y)
    y[::7] = -100
    incoming = gradients(ids)
    generator = torch.Generator().manual_seed(3)
    for number, x in enumerate(incoming):
        # Some rows have a gradient of one output alone, some none.
        x *= torch.rand(x.shape, generator=generator) < 0.3 + 0.1 * number
    check((h, w, None), y, ids, incoming, impl, device)


@pytest.mark.parametrize(
    "arrives", ["logprob", "entropy", "logsumexp", "tokens", "logprob and tokens"]
)
def test_gradients_of_some_outputs(arrives, form, impl, device):
    h, w, y = peaked_head(T, D, V, dtype=torch.bfloat16)
    ids = form(spread(h, w, y))
    incoming = [
        g if name in arrives else None for name, g in zip(OUTPUTS, gradients(ids), strict=True)
    ]
    check((h, w, None), y, ids, incoming, impl, device, ignore_index=int(y[3]))


@pytest.mark.parametrize("arrives", ["logprob", "entropy", "logsumexp"])
def test_without_a_gradient_of_ids_all_is_what_it_was(arrives, form, impl, device):
    h, w, y = peaked_head(T, D, V, dtype=torch.bfloat16)
    ids = form(spread(h, w, y)).to(device)
    incoming = [
        g if name in arrives else None for name, g in zip(OUTPUTS, gradients(ids), strict=True)
    ]

    def plain(h, w):
        found = ek.linear_logprob_entropy(ek.Head(h, w, y.to(device)), impl=impl)
        return *found[:3], found.logprob

    def ours(h, w):
        return logprobs(ek.Head(h, w, y.to(device)), ids, impl=impl)

    wanted, got = (run(f, (h, w), h.dtype, incoming, device) for f in (plain, ours))
    for a, b in zip([*got[:3], *got[4:]], [*wanted[:3], *wanted[4:]], strict=True):
        assert torch.equal(a, b)


def test_the_targets_log_prob_is_the_same_bits(form, impl, device):
    h, w, y = (x.to(device) for x in peaked_head(T, D, V))
    ids = y[:, None] if form is per_token else y
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), token_ids=ids, impl=impl)
    own = found.token_logprobs[:, 0] if form is per_token else found.token_logprobs.diagonal()
    assert torch.equal(own, found.logprob)


def test_a_likely_ids_log_prob_is_what_it_is_of_a_target(form, impl, device):
    """Products of another order err by 1e-6 at logits of 60, where log p is -1e-12."""
    h, w, _ = (x.to(device) for x in peaked_head(T, D, V))
    best = (h.double() @ w.double().T).argmax(1)
    own = ek.linear_logprob_entropy(ek.Head(h, w, best), impl=impl).logprob
    ids = best[:, None] if form is per_token else best
    found = ek.linear_logprob_entropy(ek.Head(h, w, (best + 1) % V), token_ids=ids, impl=impl)
    found = found.token_logprobs
    found = found[:, 0] if form is per_token else found.diagonal()
    likely = own > -0.69
    assert likely.sum() > T // 2
    assert torch.equal(found[likely], own[likely])


@pytest.mark.parametrize("copies", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_probability_near_1_keeps_the_digits_of_its_gradient(dtype, copies, form, impl, device):
    """d log p / dz = 1 - p = 2.47e-3: of the difference of two 16-bit paths nothing is left."""
    h, w = (torch.tensor(x, dtype=DTYPES[dtype]) for x in ([[1.0]], [[6.0], [0.0]]))
    y, ids = torch.ones(1, dtype=torch.long), torch.zeros(copies, dtype=torch.long)
    incoming = None, None, None, torch.ones(1, copies)
    *_, dh, dw = check((h, w, None), y, form(ids, 1), incoming, impl, device)
    p = 1 / (1 + torch.tensor(-6.0).double().exp())
    wanted = torch.stack([6 * (1 - p), 1 - p, p - 1]) * copies
    got = torch.cat([dh.flatten(), dw.flatten()]).double()
    torch.testing.assert_close(got, wanted, rtol=max(torch.finfo(h.dtype).eps, 1e-6), atol=0)


def test_a_probability_of_1_less_1e_7(form, impl, device):
    """Log-prob and gradients keep seven digits of 1 - p, which fp32's p has none of."""
    gap = 16.118095650958319
    h, w = torch.ones(1, 1), torch.tensor([[gap], [0.0]])
    y, ids = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    s = (-w[0].double()).exp()
    assert abs(float(s) - 1e-7) < 1e-12
    incoming = None, None, None, torch.ones(1, 1)

    def ours(h, w):
        head = ek.Head(h, w, y.to(device))
        return logprobs(head, form(ids, 1).to(device), impl=impl)

    *_, found, dh, dw = run(ours, (h, w), torch.float32, incoming, device)
    rest = s / (1 + s)
    wanted = torch.cat([-s.log1p(), gap * rest, rest, -rest])
    got = torch.cat([found.flatten(), dh.flatten(), dw.flatten()]).double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def margins(tokens, dtype):
    """Rows whose first word leads by 6 to 16 nats, exactly in 16 bits; logits of up to 60."""
    h = torch.zeros(tokens, D)
    h[:, 0] = torch.linspace(6, 16, tokens).round()
    h[:, 1] = 44.0
    w = torch.zeros(V, D)
    w[0, 0] = w[:, 1] = 1.0
    return h.to(dtype), w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_near_certain(dtype, form, impl, device):
    """Relative to 1 - p, of 6e-1 to 1e-5: one row's bound is not that of another."""
    h, w = margins(T, DTYPES[dtype])
    y = torch.arange(T) % 3
    for rows in (slice(0, 5), slice(30, T)):
        count = len(y[rows])
        ids = form(torch.tensor([0, 5, 0]), count)
        incoming = None, None, None, gradients(ids, count)[3]
        check((h[rows], w, None), y[rows], ids, incoming, impl, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_add_up_to_nothing(dtype, form, impl, device):
    """A log-ratio of two tokens: no other token has a gradient, nor does the log-sum-exp."""
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    ids = form(torch.tensor([4, 9]))
    ratio = torch.tensor([[1.0, -1.0]]).repeat(T, 1)
    *_, dh, dw = check((h, w, None), y, ids, (None, None, None, ratio), impl, device)
    wanted = (w[4].double() - w[9].double()).to(h.dtype)
    torch.testing.assert_close(dh, wanted.repeat(T, 1), rtol=0, atol=0)
    assert not dw[[i for i in range(V) if i not in (4, 9)]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_at_its_teacher(dtype, form, impl, device):
    """The gradient of a cross-entropy over all words is p - q: each of its two terms is near q."""
    if form is per_token and dtype != "fp32":
        pytest.skip("backward rounds p to 16 bits, as its docstring says")
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    q = ((h.double() * (1 + 2**-9)) @ w.double().T).softmax(1)
    incoming = None, None, None, -q
    check((h, w, None), y, form(torch.arange(V)), incoming, impl, device)


def test_the_targets_own_gradient_and_a_tokens_cancel_exactly(form, impl, device):
    h, w, y = peaked_head(T, D, V, dtype=torch.bfloat16)
    y[:] = 7
    incoming = torch.ones(T), None, None, -torch.ones(T, 1)
    *_, dh, dw = check((h, w, None), y, form(y[:1]), incoming, impl, device)
    assert not dh.any()
    assert not dw.any()


def test_rows_without_gradient_may_hold_anything(form, impl, device):
    """Ignored rows are zero, repeats equal, and a NaN stays in its row."""
    h, w, y = peaked_head(T, D, V)
    y[1::2] = -100
    h[1::2] = torch.inf
    h[4] = torch.nan
    ids = form(torch.tensor([3, 5, 3]))
    if form is per_token:
        ids[1::2] = -100
    others = torch.arange(T) != 4
    incoming = [g * others.view(-1, *[1] * (g.ndim - 1)) for g in gradients(ids)]

    def function(h, w):
        return logprobs(ek.Head(h, w, y.to(device)), ids.to(device), impl=impl)

    *outputs, dh, dw = run(function, (h, w), h.dtype, incoming, device)
    for x in outputs:
        assert not x[1::2].any()
        assert x[4].isnan().all()
    assert torch.equal(outputs[3][::2, 0].nan_to_num(), outputs[3][::2, 2].nan_to_num())
    assert not dh[1::2].any()
    assert not dh[4].any()
    assert dw.isfinite().all()


def test_masked_words_are_legal(form, impl, device):
    """A bias of -inf: log-prob -inf, and no part in other ids' log-probs and gradients."""
    h, w, y = peaked_head(T, D, V)
    b = torch.zeros(V)
    b[7:15] = -torch.inf
    y = torch.where((y >= 7) & (y < 15), 3, y)
    ids = form(torch.tensor([8, 3, 20]))
    incoming = None, None, None, gradients(ids)[3] * torch.tensor([0.0, 1.0, 1.0])

    def function(h, w):
        head = ek.Head(h, w, y.to(device), b.to(device))
        return logprobs(head, ids.to(device), impl=impl)

    *_, found, dh, dw = run(function, (h, w), h.dtype, incoming, device)
    assert (found[:, 0] == -torch.inf).all()
    assert found[:, 1:].isfinite().all()
    assert dh.isfinite().all()
    assert not dw[7:15].any()
    kept = [i for i in range(V) if not 7 <= i < 15]
    new = torch.tensor([kept.index(int(i)) for i in y])
    fewer = ids[..., 1:].apply_(kept.index)

    def without(h, w):
        head = ek.Head(h, w[kept], new.to(device))
        return logprobs(head, fewer.to(device), impl=impl)

    fewer_given = *incoming[:3], incoming[3][:, 1:]
    *_, want, want_dh, _ = run(without, (h, w), h.dtype, fewer_given, device)
    torch.testing.assert_close(found[:, 1:], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh, want_dh, rtol=1e-5, atol=1e-5)
