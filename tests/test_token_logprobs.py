"""Log-probabilities of given tokens: truth is the formula in fp64, bounds those of all logits.

T tokens, D hidden, V vocabulary, K tokens asked for.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels._token_logprobs import linear_token_logprobs
from entropy_kernels.testing import Watch, peaked_head
from tests.marks import nan_is_meant

pytestmark = nan_is_meant

T, D, V = 37, 40, 211
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def formula(h, w, y, ids, *, temperature=1.0, ignore_index=-100):
    """logprob, entropy and the tokens' log-probabilities, by all logits."""
    logp = (h @ w.T / temperature).log_softmax(1)
    valid = y != ignore_index
    logprob = logp.gather(1, y.where(valid, 0)[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(1)
    return logprob * valid, entropy * valid, logp[:, ids] * valid[:, None]


def run(function, h, w, dtype, incoming, device="cpu"):
    """The three outputs, and the gradients of h and w for `incoming`, None for none."""
    h, w = (x.detach().to(device, dtype).requires_grad_() for x in (h, w))
    outputs = function(h, w)
    pairs = [
        (x, g.to(device, x.dtype)) for x, g in zip(outputs, incoming, strict=True) if g is not None
    ]
    grads = torch.autograd.grad([x for x, _ in pairs], (h, w), [g for _, g in pairs])
    return [x.detach().cpu() for x in (*outputs, *grads)]


def assert_exact(h, w, y, ids, incoming, impl, device, **options):
    """Every output and gradient within both bounds; h and w are of the dtype to be tested."""

    def exact(h, w):
        return formula(h, w, y, ids, **options)

    def ours(h, w):
        head = ek.Head(h, w, y.to(device), **options)
        return linear_token_logprobs(head, ids.to(device), impl=impl)

    got = run(ours, h, w, h.dtype, incoming, device)
    truth = run(exact, h, w, torch.float64, incoming)
    plain = worst_of_orders(lambda: run(exact, h, w, torch.float32, incoming), truth)
    eager = plain if h.dtype == torch.float32 else run(exact, h, w, h.dtype, incoming)
    for mine, wanted, other, same in zip(got, truth, eager, plain, strict=True):
        assert mine.shape == wanted.shape
        if mine.numel() == 0:
            continue
        assert mine.isfinite().all()
        assert_within_two_bounds(mine, wanted, other, same, operands=h.dtype)
    assert (got[2] <= 0).all()
    return got


def spread(h, w, y):
    """Each row's likeliest word, its target, and words of no weight."""
    best = (h.float() @ w.float().T).argmax(1)
    return torch.cat([best[:9], y[:9].clamp_min(0), torch.tensor([0, V - 1])])


def gradients(y, ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (len(y),), (len(y),), (len(y), len(ids))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


CASES = {
    "one": lambda h, w, y: y[:1],
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
def test_outputs_and_gradients(case, dtype, impl, device):
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    ids = CASES[case](h, w, y)
    y[::7] = -100
    assert_exact(h, w, y, ids, gradients(y, ids), impl, device, temperature=0.8)


@pytest.mark.parametrize("arrives", ["logprob", "entropy", "tokens", "logprob and tokens"])
def test_gradients_of_some_outputs(arrives, impl, device):
    h, w, y = peaked_head(T, D, V, dtype=torch.bfloat16)
    ids = spread(h, w, y)
    names = "logprob", "entropy", "tokens"
    incoming = [
        g if name in arrives else None for name, g in zip(names, gradients(y, ids), strict=True)
    ]
    assert_exact(h, w, y, ids, incoming, impl, device, ignore_index=int(y[3]))


@pytest.mark.parametrize("copies", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_probability_near_1_keeps_the_digits_of_its_gradient(dtype, copies, impl, device):
    """d log p / dz = 1 - p = 2.47e-3: of the difference of two 16-bit paths nothing is left."""
    h, w = (torch.tensor(x, dtype=DTYPES[dtype]) for x in ([[1.0]], [[6.0], [0.0]]))
    y, ids = torch.zeros(1, dtype=torch.long), torch.zeros(copies, dtype=torch.long)
    incoming = None, None, torch.ones(1, copies)
    *_, dh, dw = assert_exact(h, w, y, ids, incoming, impl, device)
    p = 1 / (1 + torch.tensor(-6.0).double().exp())
    wanted = torch.stack([6 * (1 - p), 1 - p, p - 1]) * copies
    got = torch.cat([dh.flatten(), dw.flatten()]).double()
    torch.testing.assert_close(got, wanted, rtol=max(torch.finfo(h.dtype).eps, 1e-6), atol=0)


def margins(tokens, dtype):
    """Rows whose first word leads by 6 to 16 nats, exactly in 16 bits; logits of up to 60."""
    h = torch.zeros(tokens, D)
    h[:, 0] = torch.linspace(6, 16, tokens).round()
    h[:, 1] = 44.0
    w = torch.zeros(V, D)
    w[0, 0] = w[:, 1] = 1.0
    return h.to(dtype), w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_near_certain(dtype, impl, device):
    """Relative to 1 - p, of 6e-1 to 1e-5: one row's bound is not that of another."""
    h, w = margins(T, DTYPES[dtype])
    y = torch.arange(T) % 3
    ids = torch.tensor([0, 5, 0])
    for rows in (slice(0, 5), slice(30, T)):
        incoming = None, None, gradients(y[rows], ids)[2]
        assert_exact(h[rows], w, y[rows], ids, incoming, impl, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_add_up_to_nothing(dtype, impl, device):
    """A log-ratio of two tokens: no other token has a gradient, nor does the log-sum-exp."""
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    ids = torch.tensor([4, 9])
    ratio = torch.tensor([[1.0, -1.0]]).repeat(T, 1)
    *_, dh, dw = assert_exact(h, w, y, ids, (None, None, ratio), impl, device)
    wanted = (w[4].double() - w[9].double()).to(h.dtype)
    torch.testing.assert_close(dh, wanted.repeat(T, 1), rtol=0, atol=0)
    assert not dw[[i for i in range(V) if i not in (4, 9)]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_at_its_teacher(dtype, impl, device):
    """The gradient of a cross-entropy over all words is p - q: each of its two terms is near q."""
    h, w, y = peaked_head(T, D, V, dtype=DTYPES[dtype])
    q = ((h.double() * (1 + 2**-9)) @ w.double().T).softmax(1)
    incoming = None, None, -q
    assert_exact(h, w, y, torch.arange(V), incoming, impl, device)


def test_the_targets_own_gradient_and_a_tokens_cancel_exactly(impl, device):
    h, w, y = peaked_head(T, D, V, dtype=torch.bfloat16)
    y[:] = 7
    incoming = torch.ones(T), None, -torch.ones(T, 1)
    *_, dh, dw = assert_exact(h, w, y, y[:1], incoming, impl, device)
    assert not dh.any()
    assert not dw.any()


def test_rows_without_gradient_may_hold_anything(impl, device):
    """Ignored rows are zero, repeats equal, and a NaN stays in its row."""
    h, w, y = peaked_head(T, D, V)
    y[1::2] = -100
    h[1::2] = torch.inf
    h[4] = torch.nan
    ids = torch.tensor([3, 5, 3])
    incoming = [g * (torch.arange(T) != 4).view(-1, *[1] * (g.ndim - 1)) for g in gradients(y, ids)]

    def function(h, w):
        return linear_token_logprobs(ek.Head(h, w, y.to(device)), ids.to(device), impl=impl)

    *outputs, dh, dw = run(function, h, w, h.dtype, incoming, device)
    for x in outputs:
        assert not x[1::2].any()
        assert x[4].isnan().all()
    assert torch.equal(outputs[2][::2, 0].nan_to_num(), outputs[2][::2, 2].nan_to_num())
    assert not dh[1::2].any()
    assert not dh[4].any()
    assert dw.isfinite().all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_gradient(frozen, impl, device):
    h, w, y = (x.to(device) for x in peaked_head(T, D, V))
    ids = torch.tensor([3, 8], device=device)
    leaf = w if frozen == "hidden" else h
    leaf.requires_grad_()
    outputs = linear_token_logprobs(ek.Head(h, w, y), ids, impl=impl)
    sum(x.sum() for x in outputs).backward()
    assert (w if frozen == "weight" else h).grad is None
    h64, w64 = (x.detach().cpu().double().requires_grad_() for x in (h, w))
    sum(x.sum() for x in formula(h64, w64, y.cpu(), ids.cpu())).backward()
    wanted = (w64 if frozen == "hidden" else h64).grad
    torch.testing.assert_close(leaf.grad.cpu().double(), wanted, rtol=1e-4, atol=1e-5)


def test_layout_memory_and_repetition(impl, device):
    """Other strides give the same; twice the same bits; no [T, V] is held."""
    h, w, y = (x.to(device) for x in peaked_head(2 * T, 8, V, dtype=torch.bfloat16))
    ids = torch.tensor([3, 8, 3], device=device)
    far = [torch.stack([x, x], -1)[..., 0] for x in (h, w, y, ids)]
    incoming = gradients(y, ids)

    def function(h, w, y=y, ids=ids):
        return linear_token_logprobs(ek.Head(h, w, y, temperature=0.7), ids, impl=impl)

    first, second = (run(function, h, w, h.dtype, incoming, device) for _ in range(2))
    apart = [x.detach().requires_grad_() for x in far[:2]]
    outputs = function(*apart, *far[2:])
    grads = torch.autograd.grad(outputs, apart, [g.to(device) for g in incoming])
    for a, b, c in zip(first, second, (*outputs, *grads), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c.detach().cpu(), a, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_holds_no_logits(impl):
    # Blocks of the torch path have 512 x 1024 logits.
    tokens, vocabulary = 1030, 4099
    h, w, y = torch.randn(tokens, 8), torch.randn(vocabulary, 8), torch.arange(tokens)
    ids = torch.arange(40)
    h.requires_grad_(), w.requires_grad_()
    with Watch() as watch:
        outputs = linear_token_logprobs(ek.Head(h, w, y), ids, impl=impl)
        sum(x.sum() for x in outputs).backward()
    assert watch.largest < tokens * vocabulary // 4


def test_autocast_casts_as_linear_and_compiled_code_gives_the_same():
    h, w, y = peaked_head(T, D, V)
    ids, incoming = torch.tensor([3, 8, 3]), gradients(y, torch.zeros(3))

    def function(h, w):
        return linear_token_logprobs(ek.Head(h, w, y), ids)

    def cast(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return function(h, w)

    wanted = run(function, h, w, torch.bfloat16, incoming)
    for got, want in zip(run(cast, h, w, torch.float32, incoming), wanted, strict=True):
        assert torch.equal(got, want.float())
    compiled = run(torch.compile(function, backend="aot_eager"), h, w, torch.float32, incoming)
    for got, want in zip(compiled, run(function, h, w, torch.float32, incoming), strict=True):
        torch.testing.assert_close(got, want)
