"""linear_logprob_entropy: values and gradients against fp64.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _rows
from entropy_kernels.verification.truth import ROWS, run
from tests.head_cases import (
    BY_TRITON,
    DTYPES,
    assert_as_reference,
    check_statistics,
    dtype_of_products,
    make,
    numbers,
    with_statistics,
)
from tests.marks import nan_is_meant, not_interpreted, sampled

pytestmark = sampled(0.2)

# Blocks of rows, of the vocabulary, and what is beyond them.
SHAPES = {
    "one": ((0, 1), 1, (0, 1)),
    "two words": ((0, 3), 1, (0, 2)),
    "prime": ((0, 31), 37, (0, 1021)),
    "one block": ((1, 0), 16, (1, 0)),
    "one more": ((1, 1), 16, (1, 1)),
    "several blocks": ((0, 67), 40, (3, 7)),
}


OUTPUTS = ek.LogprobEntropy._fields[:3]
# Sizes of models, and one, each with a dtype; the largest have 16 bits.
VOCABULARIES = [
    *((50257, torch.float32), (129920, torch.float16), (151936, torch.bfloat16)),
    *((152064, torch.float16), (65537, torch.bfloat16)),
]


def check(head, inputs, device, keep=0.5, orders=4, **options):
    """Both bounds for the outputs and every gradient."""
    T = inputs[2].numel()
    grads = [torch.randn(T, device=device) * (torch.rand(T, device=device) < keep) for _ in "abc"]
    got = run(head, inputs, grads, **options)
    operands = dtype_of_products(head.keywords["impl"], inputs[0].dtype)
    assert_as_reference(got, inputs, grads, operands=operands, orders=orders, **options)


def check_with_statistics(head, inputs, device, **options):
    """Both bounds for the statistics too."""
    check(head, inputs, device, **options)
    h, w, y, b = inputs
    found = with_statistics(head, h, w, y, bias=b, **options)
    assert not any(x[y == options.get("ignore_index", -100)].any() for x in found)
    check_statistics(found[3:], h, w, y, bias=b, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_kind(head, rows, dtype, block, device):
    inputs = (*make(rows, (67, 40, 2 * block[1] + 7), dtype, device), None)
    check_with_statistics(head, inputs, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@not_interpreted
def test_shapes(head, shape, dtype, block, device):
    (blocks_t, more_t), hidden, (blocks_v, more_v) = shape
    shape = blocks_t * block[0] + more_t, hidden, blocks_v * block[1] + more_v
    check(head, (*make("peaked", shape, dtype, device), None), device)


@pytest.mark.parametrize(("vocabulary", "dtype"), VOCABULARIES)
@not_interpreted
def test_vocabularies_that_no_tile_divides(head, vocabulary, dtype, device):
    inputs = (*make("peaked", (31, 32, vocabulary), dtype, device), None)
    check(head, inputs, device, orders=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"temperature": 0.7},
        {"temperature": "per token"},
        {"softcap": 5.0},
        {"logit_scale": 0.0625},
        {"ignore": True},
        {"bias": True, "temperature": "per token", "softcap": 5.0, "ignore": True},
        {"bias": True, "temperature": "per token", "softcap": 5.0, "logit_scale": 2.5},
    ],
    ids=lambda o: "+".join(o),
)
def test_options(head, options, dtype, block, device):
    h, w, y = make("peaked", (67, 40, block[1] + 7), dtype, device)
    options = dict(options)
    b = torch.randn(w.shape[0], device=device).to(dtype) if options.pop("bias", False) else None
    if options.pop("ignore", False):
        y[::3] = -1
        options["ignore_index"] = -1
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(67, device=device) + 0.5
    # A scale of 1/16 leaves rows so flat that varentropy's sums cancel.
    checked = check if "logit_scale" in options else check_with_statistics
    checked(head, (h, w, y, b), device, **options)


def test_entropies_keep_their_digits_down_to_1e_12(head, impl):
    """Two words g nats apart, s = exp(-g): outputs and statistics in closed form.

    With D = 1 and h = 1 the weight is the logits. log_softmax in fp64 could not tell.
    """
    for gap in (0.5, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0):
        z = torch.tensor([[-100.0], [-gap], [-100.0], [0.0], [-100.0]])
        s = torch.tensor(-gap, dtype=torch.float64).exp()
        outputs = {"logprob": -s.log1p(), "entropy": s.log1p() + gap * s / (1 + s)}
        statistics = {
            "varentropy": gap**2 * s / (1 + s) ** 2,
            "max_prob": 1 / (1 + s),
            "sum_p2": (1 + s**2) / (1 + s) ** 2,
            "sum_p2_logp": -(gap * s**2 + s.log1p() * (1 + s**2)) / (1 + s) ** 2,
            "mean_logit": torch.tensor(-(300 + gap) / 5, dtype=torch.float64),
            "is_top1": torch.tensor(True),
        }
        for wanted, digits, rounding in ((outputs, 3e-7, 2**-24), (statistics, 4e-7, 2**-23)):
            asked = _rows.filled(impl) if wanted is statistics else ()
            found = head(torch.ones(1, 1), z, torch.tensor([3]), statistics=asked)
            # On a GPU the exponent is taken to base 2, in fp32: it is rounded once more.
            digits += gap * rounding if impl in BY_TRITON else 0
            for name in asked or wanted:
                want = wanted[name]
                error = abs(getattr(found, name).double() - want.double())
                assert error <= digits * abs(want.double()), (name, gap)


def test_entropy_is_never_negative_and_logprob_never_positive(head, block, device):
    h, w, y = make("peaked", (67, 64, 4 * block[1] + 7), torch.float32, device)
    found = head(h * 3, w, y)
    assert (found.entropy >= 0).all()
    assert (found.logprob <= 0).all()
    best = (h * 3 @ w.T).argmax(1)
    assert (head(h * 3, w, best).logprob <= 0).all()


@pytest.mark.parametrize("used", OUTPUTS)
def test_each_output_alone(head, used, block):
    """The other outputs' gradients never arrive."""
    inputs = (*make("peaked", (33, 24, block[1] + 7), torch.float32), None)
    grads = [torch.randn(33) if name == used else None for name in OUTPUTS]
    assert_as_reference(run(head, inputs, grads), inputs, grads)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("more", ["nothing", "keep_logits_above", "statistics"])
def test_nothing_to_do(head, impl, tokens, more, device):
    """No token at all, or every token ignored."""
    h = torch.randn(tokens, 8, device=device, requires_grad=True)
    w = torch.randn(33, 8, device=device, requires_grad=True)
    options = {"keep_logits_above": 0.0, "statistics": _rows.filled(impl)}
    options = {name: value for name, value in options.items() if name == more}
    found = head(h, w, torch.full((tokens,), -100, device=device), **options)
    assert all(x is None or (x.shape == (tokens,) and not x.any()) for x in found)
    found.logprob.sum().backward()
    assert (h.grad == 0).all()
    assert (w.grad == 0).all()


def test_leading_dimensions_and_strides(head, device):
    h, w, y = make("peaked", (24, 16, 257), torch.float32, device)
    flat = with_statistics(head, h, w, y)
    strided_h = h.T.contiguous().T.reshape(2, 3, 4, 16)
    strided_w = torch.stack([w, w], dim=1)[:, 0]
    assert not strided_w.is_contiguous()
    targets = y.reshape(2, 3, 4).to(torch.int32)
    found = with_statistics(head, strided_h, strided_w, targets)
    for got, want in zip(found, flat, strict=True):
        assert got.shape == (2, 3, 4)
        assert torch.equal(got.flatten(), want)

    h.requires_grad_()
    expanded = h[:1].expand(24, 16)
    w.requires_grad_()
    head(expanded, w.T.contiguous().T, y).logprob.sum().backward()
    assert h.grad[0].abs().sum() > 0
    assert (h.grad[1:] == 0).all()


def test_the_same_bits_twice(head, block, device):
    h, w, y = make("peaked", (67, 40, 2 * block[1] + 7), torch.bfloat16, device)
    results = []
    for _ in range(2):
        x = h.clone().requires_grad_()
        weight = w.clone().requires_grad_()
        found = head(x, weight, y)
        (found.logprob + found.entropy).sum().backward()
        results.append([*found[:3], x.grad, weight.grad])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@nan_is_meant
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_poisons_itself_alone(head, value, device):
    h, w, y = make("peaked", (9, 16, 1031), torch.float32, device)
    clean = with_statistics(head, h, w, y)
    h[4, 3] = value
    for got, want in zip(with_statistics(head, h, w, y), clean, strict=True):
        assert got[4].isnan() if got.is_floating_point() else not got[4]
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        torch.testing.assert_close(got[others], want[others], rtol=1e-6, atol=1e-6)


@nan_is_meant
@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_bad_weight_poisons_every_row_but_the_ignored(head, keep_logits, device):
    h, w, y = make("peaked", (9, 16, 1031), torch.float32, device)
    w[1030, 2] = torch.nan
    y[3] = -100
    h.requires_grad_()
    found = with_statistics(head, h, w, y, keep_logits=keep_logits)
    found[0].sum().backward()
    for x in (*numbers(found), *h.grad.T):
        assert x.isnan().sum() == 8
        assert x[3] == 0


@nan_is_meant
@pytest.mark.parametrize("where", ["weight", "bias", "product"])
def test_a_logit_of_inf_leaves_no_distribution(head, device, where):
    """Wherever the target is; a finite loss and finite gradients would say that all is well."""
    h, w, y = make("peaked", (9, 16, 1031), torch.float32, device)
    b = torch.zeros(1031, device=device)
    h[:, 2] = 1.0
    y[0], y[1:] = 1030, 7
    if where == "weight":
        w[1030, 2] = torch.inf
    elif where == "bias":
        b[1030] = torch.inf
    else:
        h[:, 2], w[1030, 2] = 1e3, 3e38
    h.requires_grad_()
    w.requires_grad_()
    found = head(h, w, y, bias=b)
    for x in found[:3]:
        assert x.isnan().all()
    (found.logprob + found.entropy).sum().backward()
    assert h.grad.isnan().all()
    assert w.grad.isnan().any(1).all()


@nan_is_meant
def test_a_masked_vocabulary_is_legal(head, block, device):
    """-inf logits have probability 0, no part in the entropy, and no gradient."""
    h, w, y = make("peaked", (33, 16, 2 * block[1] + 7), torch.float32, device)
    b = torch.zeros(w.shape[0], device=device)
    first, end = block[1] // 10, 3 * block[1] // 2
    b[first:end] = -torch.inf
    y = torch.where((y >= first) & (y < end), 3, y)
    keep = b == 0
    w.requires_grad_()
    found = with_statistics(head, h, w, y, bias=b)
    (found[0] + found[1]).sum().backward()
    assert (w.grad[~keep] == 0).all()
    assert w.grad.isfinite().all()

    dense = w.detach()[keep].clone().requires_grad_()
    renumbered = (keep.cumsum(0) - 1)[y]
    want = with_statistics(head, h, dense, renumbered)
    (want[0] + want[1]).sum().backward()
    assert (found[7] == -torch.inf).all(), "the mean of all logits"
    del found[7], want[7]
    torch.testing.assert_close(found[3:], want[3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], want[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad[keep], dense.grad, rtol=1e-4, atol=1e-5)
    masked_target = head(h, w, torch.full_like(y, first), bias=b)
    assert (masked_target.logprob == -torch.inf).all()
    nowhere = with_statistics(head, h, w, y, bias=torch.full_like(b, -torch.inf))
    assert all(x.isnan().all() for x in numbers(nowhere[1:]))
    assert not nowhere[-1].any()
