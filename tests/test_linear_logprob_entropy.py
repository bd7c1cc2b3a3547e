"""linear_logprob_entropy: values and gradients against fp64, and what each path may cost.

T tokens, D hidden, V vocabulary.
"""

import functools

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import reference
from entropy_kernels._torch import blocks
from entropy_kernels.testing import Watch, assert_within_two_bounds, peaked_head

BLOCK_T, BLOCK_V = blocks._SIZES["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks of rows, of the vocabulary, and what is beyond them.
SHAPES = {
    "one": ((0, 1), 1, (0, 1)),
    "two words": ((0, 3), 1, (0, 2)),
    "prime": ((0, 31), 37, (0, 1021)),
    "one block": ((1, 0), 16, (1, 0)),
    "one more": ((1, 1), 16, (1, 1)),
    "several blocks": ((0, 67), 40, (3, 7)),
}
ROWS = ["peaked", "uniform", "tied", "very negative", "large"]
VOCABULARIES = [50257, 129920, 151936, 152064, 65537]


@pytest.fixture
def head(impl):
    return functools.partial(ek.linear_logprob_entropy, impl=impl)


# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
nan_is_meant = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


@pytest.fixture
def block(impl, device) -> tuple[int, int]:
    """(rows, vocabulary) of a block: small in Triton's interpreter, which takes ms for each."""
    return (32, 64) if impl == "triton" and device == "cpu" else (BLOCK_T, BLOCK_V)


def make(rows: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Hidden states, weight and targets whose logits are of one kind."""
    T, D, V = shape
    h, w, y = peaked_head(T, D, V)
    if rows == "uniform":
        h = torch.zeros_like(h)
    elif rows == "tied":
        w = w[: max(V // 2, 1)].repeat(3, 1)[:V]
    elif rows == "very negative":
        h[:, 0], w[:, 0] = 20.0, -20.0
    elif rows == "large":
        h = h / h.norm(dim=1, keepdim=True).clamp_min(1e-6) * 200
    return h.to(device, dtype), w.to(device, dtype), y.to(device)


def run(function, inputs, grads, **options):
    """Outputs and gradients (hidden, weight, bias) of a head."""
    h, w, y, b = inputs
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    b = None if b is None else b.detach().clone().requires_grad_()
    outputs = list(function(h, w, y, bias=b, **options)[:3])
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [o.detach() for o in outputs], [x.grad for x in (h, w, b) if x is not None]


def in_dtype(dtype):
    def function(h, w, y, bias=None, **options):
        bias = None if bias is None else bias.to(dtype)
        return reference.linear_logprob_entropy(
            h.to(dtype), w.to(dtype), y, bias, *_reference_options(**options)
        )

    return function


def _reference_options(temperature=1.0, softcap=None, ignore_index=-100):
    return temperature, softcap, ignore_index


def check(head, inputs, device, keep=0.5, **options):
    """Both bounds, for the three outputs and every gradient.

    The compiled kernels with bf16 inputs, and Triton's with 16 bits, round dz for its products, as
    eager does.
    """
    T = inputs[2].numel()
    grads = [torch.randn(T, device=device) * (torch.rand(T, device=device) < keep) for _ in "abc"]
    got = run(head, inputs, grads, **options)
    truth = run(in_dtype(torch.float64), inputs, grads, **options)
    eager = run(in_dtype(inputs[0].dtype), inputs, grads, **options)
    plain = run(in_dtype(torch.float32), inputs, grads, **options)
    impl, dtype = head.keywords["impl"], inputs[0].dtype
    rounds = impl == "triton" or (impl == "cpu" and dtype == torch.bfloat16)
    for side, operands in ((0, torch.float32), (1, dtype if rounds else torch.float32)):
        for quartet in zip(got[side], truth[side], eager[side], plain[side], strict=True):
            assert_within_two_bounds(*quartet, operands=operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_kind(head, rows, dtype, block, device):
    check(head, (*make(rows, (67, 40, 2 * block[1] + 7), dtype, device), None), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(head, shape, dtype, block, device):
    (blocks_t, more_t), hidden, (blocks_v, more_v) = shape
    shape = blocks_t * block[0] + more_t, hidden, blocks_v * block[1] + more_v
    check(head, (*make("peaked", shape, dtype, device), None), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabularies_that_no_tile_divides(head, vocabulary, dtype, block, device):
    if block[1] < BLOCK_V:
        vocabulary %= 1001  # as odd
    check(head, (*make("peaked", (31, 32, vocabulary), dtype, device), None), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"temperature": 0.7},
        {"temperature": "per token"},
        {"softcap": 5.0},
        {"ignore": True},
        {"bias": True, "temperature": "per token", "softcap": 5.0, "ignore": True},
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
    check(head, (h, w, y, b), device, **options)


def test_entropies_keep_their_digits_down_to_1e_12(head, impl):
    """Two words g nats apart: s = exp(-g), logprob = -log1p(s), H = log1p(s) + g s / (1 + s).

    With D = 1 and h = 1 the weight is the logits. log_softmax in fp64 could not tell.
    """
    for gap in (0.5, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0):
        z = torch.tensor([[-100.0], [-gap], [-100.0], [0.0], [-100.0]])
        s = torch.tensor(-gap, dtype=torch.float64).exp()
        got = head(torch.ones(1, 1), z, torch.tensor([3]))
        entropy = s.log1p() + gap * s / (1 + s)
        # On a GPU the exponent is taken to base 2, in fp32: it is rounded once more.
        digits = 3e-7 + (gap * 2**-24 if impl == "triton" else 0)
        assert abs(got.entropy.double() - entropy) <= digits * entropy
        assert abs(got.logprob.double() + s.log1p()) <= digits * s.log1p()


def test_entropy_is_never_negative_and_logprob_never_positive(head, block, device):
    h, w, y = make("peaked", (257, 64, 4 * block[1] + 907), torch.float32, device)
    found = head(h * 3, w, y)
    assert (found.entropy >= 0).all()
    assert (found.logprob <= 0).all()
    best = (h * 3 @ w.T).argmax(1)
    assert (head(h * 3, w, best).logprob <= 0).all()


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2, 0.1])
def test_products_of_backward_fall_with_the_fraction(head, fraction, block):
    T, D, V = 200, 24, 4 * block[1] + 3
    h, w, y = make("peaked", (T, D, V), torch.float32)
    h.requires_grad_()
    w.requires_grad_()
    with Watch() as forward:
        found = head(h, w, y)
    keep = ek.top_entropy_mask(found.entropy.detach(), fraction=fraction)
    with Watch() as backward:
        (found.logprob * keep).sum().backward()
    assert forward.products == T * V * D
    assert backward.products == 3 * round(fraction * T) * V * D


def test_clipped_and_zero_advantage_rows_are_dropped_too(head, block):
    T, D, V = 64, 16, 2 * block[1] + 5
    h, w, y = make("peaked", (T, D, V), torch.float32)
    w.requires_grad_()
    found = head(h, w, y)
    advantage = torch.ones(T)
    advantage[:20] = 0
    old = found.logprob.detach().clone()
    old[20:30] -= 1.0
    loss, metrics = ek.ratio_loss(found.logprob, old, advantage, torch.ones(T, dtype=torch.bool))
    with Watch() as backward:
        loss.backward()
    assert backward.products == 2 * 34 * V * D
    assert metrics["head/active_rows"] == 34


@pytest.mark.parametrize(
    ("frozen", "products"), [("weight", 2), ("hidden", 2), ("bias", 3), ("all but bias", 1)]
)
def test_what_is_frozen_costs_nothing(head, frozen, products):
    T, D, V = 40, 16, 1031
    h, w, y = make("peaked", (T, D, V), torch.float32)
    b = torch.randn(V)
    for name, x in {"hidden": h, "weight": w, "bias": b}.items():
        x.requires_grad_(name == "bias" if frozen == "all but bias" else name != frozen)
    found = head(h, w, y, bias=b)
    with Watch() as backward:
        found.logprob.sum().backward()
    assert backward.products == products * T * V * D
    for x in (h, w, b):
        assert (x.grad is not None) == x.requires_grad


@pytest.mark.parametrize("used", ["logprob", "entropy", "logsumexp"])
def test_each_output_alone(head, used):
    """The other outputs' gradients never arrive."""
    h, w, y = make("peaked", (33, 24, 1031), torch.float32)
    h.requires_grad_()
    getattr(head(h, w, y), used).square().sum().backward()
    h64 = h.detach().double().requires_grad_()
    outputs = reference.linear_logprob_entropy(h64, w.double(), y)
    outputs[ek.LogprobEntropy._fields.index(used)].square().sum().backward()
    plain = h.detach().clone().requires_grad_()
    outputs = reference.linear_logprob_entropy(plain, w, y)
    outputs[ek.LogprobEntropy._fields.index(used)].square().sum().backward()
    assert_within_two_bounds(h.grad, h64.grad, plain.grad, plain.grad)


def test_no_tensor_of_tokens_times_vocabulary(head, impl, block, monkeypatch):
    if impl == "triton":
        from entropy_kernels._triton import linear_logprob_entropy_backward as backward

        monkeypatch.setattr(backward, "CHUNK_V", block[1] // 2)
    T, D, V = 3 * block[0], block[1] // 32, 4 * block[1]
    h, w, y = make("uniform", (T, D, V), torch.float32)
    h.requires_grad_()
    w.requires_grad_()
    with Watch() as watch:
        found = head(h, w, y)
        (found.logprob.sum() + found.entropy.sum()).backward()
    assert watch.products == 4 * T * D * V
    assert watch.largest < T * V / 4


def test_kept_logits_save_a_product(head, block):
    vocabulary = 2 * block[1] + 5
    h, w, y = make("peaked", (50, 24, vocabulary), torch.bfloat16)
    w.requires_grad_()
    h.requires_grad_()
    grads = []
    for keep_logits, products in ((True, 2), (False, 3)):
        h.grad = w.grad = None
        found = head(h, w, y, keep_logits=keep_logits)
        with Watch() as backward:
            (found.logprob - 0.1 * found.entropy).sum().backward()
        assert backward.products == products * 50 * 24 * vocabulary
        grads.append((h.grad, w.grad))
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_logits_of_rows_above_a_threshold_may_be_kept_and_change_no_gradient(
    head, impl, block, device, as_tensor
):
    """By "triton" alone: two products of the rows above instead of three."""
    vocabulary = 2 * block[1] + 5
    h, w, y = make("peaked", (50, 24, vocabulary), torch.float32, device)
    w.requires_grad_()
    h.requires_grad_()
    entropy = head(h, w, y).entropy.detach()
    above = entropy.sort(descending=True).values[9]
    grads = []
    for options in ({"keep_logits_above": above if as_tensor else above.item()}, {}):
        h.grad = w.grad = None
        found = head(h, w, y, **options)
        with Watch() as backward:
            ((found.logprob - 0.1 * found.entropy) * (entropy >= above)).sum().backward()
        products = 2 if impl == "triton" and options else 3
        assert backward.products == products * 10 * 24 * vocabulary
        grads.append((h.grad, w.grad))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-4, atol=1e-6)


@nan_is_meant
def test_ignored_rows_cost_nothing_on_cpu_and_never_poison(head, impl):
    h, w, y = make("peaked", (60, 24, 1031), torch.float32)
    y[10:50] = -100
    h[10:50] = torch.nan
    h.requires_grad_()
    with Watch() as forward:
        found = head(h, w, y)
    # On a GPU their number would have to reach the host first.
    assert forward.products == (60 if impl == "triton" else 20) * 24 * 1031
    for x in found[:3]:
        assert (x[10:50] == 0).all()
        assert x.isfinite().all()
    found.logprob.sum().backward()
    assert (h.grad[10:50] == 0).all()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_do(head, tokens, device):
    """No token at all, or every token ignored."""
    h = torch.randn(tokens, 8, device=device, requires_grad=True)
    w = torch.randn(33, 8, device=device, requires_grad=True)
    found = head(h, w, torch.full((tokens,), -100, device=device))
    assert found.logprob.shape == (tokens,)
    found.logprob.sum().backward()
    assert (h.grad == 0).all()
    assert (w.grad == 0).all()


def test_leading_dimensions_and_strides(head, device):
    h, w, y = make("peaked", (24, 16, 257), torch.float32, device)
    flat = head(h, w, y)
    strided_h = h.T.contiguous().T.reshape(2, 3, 4, 16)
    strided_w = torch.stack([w, w], dim=1)[:, 0]
    assert not strided_w.is_contiguous()
    found = head(strided_h, strided_w, y.reshape(2, 3, 4).to(torch.int32))
    for got, want in zip(found[:3], flat[:3], strict=True):
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
    clean = head(h, w, y)
    h[4, 3] = value
    for got, want in zip(head(h, w, y)[:3], clean[:3], strict=True):
        assert got[4].isnan()
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        torch.testing.assert_close(got[others], want[others], rtol=1e-6, atol=1e-6)


def test_a_bad_weight_poisons_every_row(head, device):
    h, w, y = make("peaked", (9, 16, 1031), torch.float32, device)
    w[1030, 2] = torch.nan
    for x in head(h, w, y)[:3]:
        assert x.isnan().all()
    h.requires_grad_()
    head(h, w, y).logprob.sum().backward()
    assert h.grad.isnan().all()


@nan_is_meant
def test_a_masked_vocabulary_is_legal(head, device):
    """-inf logits have probability 0, no part in the entropy, and no gradient."""
    h, w, y = make("peaked", (33, 16, 2 * BLOCK_V + 7), torch.float32, device)
    b = torch.zeros(w.shape[0], device=device)
    b[100:1500] = -torch.inf
    y = torch.where((y >= 100) & (y < 1500), 3, y)
    keep = b == 0
    w.requires_grad_()
    found = head(h, w, y, bias=b)
    (found.logprob + found.entropy).sum().backward()
    assert (w.grad[~keep] == 0).all()
    assert w.grad.isfinite().all()

    dense = w.detach()[keep].clone().requires_grad_()
    renumbered = (keep.cumsum(0) - 1)[y]
    want = head(h, dense, renumbered)
    (want.logprob + want.entropy).sum().backward()
    torch.testing.assert_close(found.entropy, want.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logprob, want.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad[keep], dense.grad, rtol=1e-4, atol=1e-5)
    masked_target = head(h, w, torch.full_like(y, 200), bias=b)
    assert (masked_target.logprob == -torch.inf).all()
    nowhere = head(h, w, y, bias=torch.full_like(b, -torch.inf))
    assert nowhere.entropy.isnan().all()


def test_opcheck(impl, device, unchecked_shapes):
    h, w, y = make("peaked", (9, 8, 67), torch.float32, device)
    h.requires_grad_()
    w.requires_grad_()
    b = torch.randn(67, device=device, requires_grad=True)
    temperature = torch.rand(9, device=device) + 0.5
    forward = torch.ops.entropy_kernels.linear_logprob_entropy.default
    for keep_logits in (False, True):
        arguments = (h, w, y, b, temperature, 5.0, -100, keep_logits, None, None, impl)
        torch.library.opcheck(forward, arguments)
    found = forward(h, w, y, b, temperature, 5.0, -100, False, None, None, impl)
    statistics = [x.detach() for x in (found[1], *found[3:6])]
    grads = [torch.randn(9, device=device), torch.randn(9, device=device), None]
    leaves = [x.detach() for x in (h, w, y, b, temperature)]
    torch.library.opcheck(
        torch.ops.entropy_kernels.linear_logprob_entropy_backward.default,
        (*grads, *leaves, 5.0, -100, *statistics, True, False, True, None, None, impl),
    )
    main_grad = torch.ones(67, 8, device=device)
    torch.library.opcheck(
        torch.ops.entropy_kernels.linear_logprob_entropy_backward.default,
        (*grads, *leaves, 5.0, -100, *statistics, True, True, True, 9, main_grad, impl),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_gradient_can_go_into_a_main_grad(head, dtype, device):
    h, w, y = make("peaked", (33, 16, 1031), dtype, device)
    h, w = h.requires_grad_(), w.requires_grad_()
    head(h, w, y).logprob[:20].sum().backward()
    main_grad = torch.ones_like(w, dtype=torch.float32)
    want, dh, h.grad, w.grad = w.grad.float() + 1, h.grad, None, None
    head(h, w, y, main_grad=main_grad).logprob[:20].sum().backward()
    assert w.grad is None
    assert torch.equal(h.grad, dh)
    unit = torch.finfo(dtype).eps * float((want - 1).abs().max()) + 1e-6
    torch.testing.assert_close(main_grad, want, rtol=0, atol=unit)


def test_a_main_grad_of_a_frozen_weight_is_an_error(head, device):
    h, w, y = make("peaked", (9, 8, 67), torch.float32, device)
    main_grad = torch.zeros_like(w)
    with pytest.raises(ValueError, match=r"main_grad takes the gradient of weight.*frozen"):
        head(h.requires_grad_(), w, y, main_grad=main_grad)
    with pytest.raises(ValueError, match=r"main_grad takes the gradient of weight.*frozen"):
        ek.high_entropy_policy_loss(
            h,
            w,
            y,
            None,
            torch.ones(9, device=device),
            torch.ones(9, dtype=torch.bool, device=device),
            main_grad=main_grad,
            impl=head.keywords["impl"],
        )


@pytest.mark.parametrize("bound", [20, 33, 100])
def test_a_bound_of_the_active_rows_changes_nothing(head, bound, device):
    h, w, y = make("peaked", (33, 16, 1031), torch.float32, device)
    grads = []
    for options in ({}, {"max_active_rows": bound}):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        head(x, weight, y, **options).logprob[5:25].sum().backward()
        grads.append((x.grad, weight.grad))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_more_active_rows_than_their_bound_are_never_dropped(head, impl, device):
    h, w, y = make("peaked", (33, 16, 1031), torch.float32, device)
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = head(h, w, y, max_active_rows=19).logprob[5:25].sum()
    if impl != "triton":
        with pytest.raises(ValueError, match="max_active_rows is 19; got gradients at 20 rows"):
            loss.backward()
        return
    loss.backward()
    assert h.grad.isnan().all()
    assert w.grad.isnan().all()


def test_compiles_into_one_graph(head, unchecked_shapes):
    h, w, y = make("peaked", (9, 8, 67), torch.float32)

    def step(h, w):
        found = head(h, w, y, temperature=0.7, softcap=5.0)
        return (found.logprob - 0.1 * found.entropy).sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        function(x, weight).backward()
        grads.append((x.grad, weight.grad))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def test_autocast_casts_as_linear_does_and_stays_fp32_inside(head, device):
    h, w, y = make("peaked", (33, 16, 1031), torch.float32, device)
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        found = head(h, w, y)
        found.logprob.sum().backward()
    want = head(h.bfloat16(), w.bfloat16(), y)
    assert torch.equal(found.logprob, want.logprob)
    assert torch.equal(found.entropy, want.entropy)
    assert h.grad.dtype == w.grad.dtype == torch.float32


def test_reference_implementation_takes_fp64():
    h, w, y = make("peaked", (9, 8, 67), torch.float32)
    found = ek.linear_logprob_entropy(h.double(), w.double(), y, impl="reference")
    assert found.entropy.dtype == torch.float64
    default = ek.linear_logprob_entropy(h, w, y)
    torch.testing.assert_close(default.entropy.double(), found.entropy, rtol=1e-5, atol=1e-6)


BAD = {
    "dtype": (lambda h, w, y: (h.double(), w.double(), y), {}, "float64"),
    "mixed dtypes": (lambda h, w, y: (h, w.bfloat16(), y), {}, "got torch.bfloat16"),
    "hidden size": (lambda h, w, y: (h[:, :7], w, y), {}, r"\(9, 7\) and \(67, 8\)"),
    "weight rank": (lambda h, w, y: (h, w[0], y), {}, r"\[V, D\]"),
    "empty vocabulary": (lambda h, w, y: (h, w[:0], y), {}, r"V > 0.*\(0, 8\)"),
    "target shape": (lambda h, w, y: (h, w, y[:8]), {}, r"\(9,\); got \(8,\)"),
    "target dtype": (lambda h, w, y: (h, w, y.float()), {}, "int64 or int32; got torch.float32"),
    "target too large": (lambda h, w, y: (h, w, y + 67), {}, r"\[0, 67\)"),
    "target negative": (lambda h, w, y: (h, w, y - 100), {"ignore_index": -1}, "ignore_index=-1"),
    "bias shape": (lambda h, w, y: (h, w, y), {"bias": torch.zeros(66)}, r"\[67\]; got \(66,\)"),
    "bias dtype": (
        lambda h, w, y: (h, w, y),
        {"bias": torch.zeros(67, dtype=torch.float16)},
        "got torch.float16",
    ),
    "temperature": (lambda h, w, y: (h, w, y), {"temperature": 0.0}, "> 0; got 0.0"),
    "a temperature": (
        lambda h, w, y: (h, w, y),
        {"temperature": torch.tensor([1.0] * 8 + [-1.0])},
        "> 0; got -1.0",
    ),
    "temperature shape": (
        lambda h, w, y: (h, w, y),
        {"temperature": torch.ones(8)},
        r"\(9,\); got \(8,\)",
    ),
    "temperature with gradient": (
        lambda h, w, y: (h, w, y),
        {"temperature": torch.ones(9, requires_grad=True)},
        "not differentiated",
    ),
    "softcap": (lambda h, w, y: (h, w, y), {"softcap": -1.0}, "> 0 or None; got -1.0"),
    "max_active_rows": (
        lambda h, w, y: (h, w, y),
        {"max_active_rows": -1},
        ">= 0 or None; got -1",
    ),
    "main_grad": (
        lambda h, w, y: (h, w, y),
        {"main_grad": torch.zeros(67, 9)},
        r"main_grad must be .*\(67, 8\).*; got .*\(67, 9\)",
    ),
    "main_grad with gradient": (
        lambda h, w, y: (h, w, y),
        {"main_grad": torch.zeros(67, 8, requires_grad=True)},
        "written to",
    ),
    "main_grad of the reference": (
        lambda h, w, y: (h, w, y),
        {"main_grad": torch.zeros(67, 8), "impl": "reference"},
        "not written",
    ),
    "two ways to keep logits": (
        lambda h, w, y: (h, w, y),
        {"keep_logits": True, "keep_logits_above": 0.5},
        "keep_logits keeps all",
    ),
    "keep_logits_above": (
        lambda h, w, y: (h, w, y),
        {"keep_logits_above": torch.nan},
        "nats; got nan",
    ),
    "keep_logits_above shape": (
        lambda h, w, y: (h, w, y),
        {"keep_logits_above": torch.zeros(9)},
        r"one value on cpu.*got \(9,\)",
    ),
    "impl": (lambda h, w, y: (h, w, y), {"impl": "fast"}, r"auto, reference, torch.*; got 'fast'"),
    "device": (lambda h, w, y: (h, w.to("meta"), y), {}, "on cpu, like hidden; got meta"),
}


@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_came_and_what_was_wanted(change, options, message, unchecked_shapes):
    h, w, y = change(*make("peaked", (9, 8, 67), torch.float32))
    with pytest.raises(ValueError, match=message):
        ek.linear_logprob_entropy(h, w, y, **options)


def test_values_that_cannot_be_checked_without_synchronising_become_nan():
    """What CUDA sees, called below the check: the row is poisoned, its neighbours are not."""
    h, w, y = make("peaked", (9, 8, 67), torch.float32)
    y[2] = 67
    temperature = torch.ones(9)
    temperature[5] = 0.0
    found = _torch_forward(h, w, y, None, temperature, None, -100, keep_logits=False)
    assert found.logprob.isnan().nonzero().flatten().tolist() == [2, 5]
    assert found.entropy.isnan().nonzero().flatten().tolist() == [2, 5]


def _torch_forward(*args, **kwargs):
    from entropy_kernels._torch.linear_logprob_entropy import linear_logprob_entropy

    return linear_logprob_entropy(*args, **kwargs)
