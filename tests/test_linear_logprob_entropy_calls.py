"""linear_logprob_entropy as it is called: registered, compiled, cast, and with bad input.

T tokens, D hidden, V vocabulary.
"""

import itertools

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _rows
from entropy_kernels._torch.head_forward import forward
from tests.head_cases import BY_TRITON, logprob_entropy, make
from tests.marks import sampled

pytestmark = sampled(0.2)


def test_opcheck(impl, device, unchecked_shapes):
    h, w, y = make("peaked", (9, 8, 67), torch.float32, device)
    h.requires_grad_()
    w.requires_grad_()
    b = torch.randn(67, device=device, requires_grad=True)
    temperature = torch.rand(9, device=device) + 0.5
    ops = torch.ops.entropy_kernels
    forward, backward = ops.linear_logprob_entropy, ops.linear_logprob_entropy_backward
    for keep_logits, wanted in itertools.product((False, True), (0, 4, 6)):
        arguments = (h, w, y, b, temperature, 5.0, -100, keep_logits, None, None, impl)
        torch.library.opcheck(forward.default, arguments, {"statistics_wanted": wanted})
    grads = [torch.randn(9, device=device), torch.randn(9, device=device), None]
    leaves = [x.detach() for x in (h, w, y, b, temperature)]
    main_grad = torch.ones(67, 8, device=device)
    # These backends alone store the logits of some rows.
    for stored in ((), (torch.tensor(0.1, device=device), 4))[: 1 + (impl in BY_TRITON)]:
        arguments = (h, w, y, b, temperature, 5.0, -100, False, None, None, impl, *stored)
        torch.library.opcheck(forward.default, arguments)
        found = [x.detach() for x in forward(*arguments)]
        rows, places = (found[1], *found[3:6]), found[6] if stored else None
        for needs in ((True, False, True, None, None), (True, True, True, 9, main_grad)):
            arguments = (*grads, *leaves, 5.0, -100, *rows, *needs, impl, places)
            torch.library.opcheck(backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("more", ["nothing", "statistics", "keep_logits_above"])
def test_compiles_into_one_graph(head, impl, more, dynamic, device, unchecked_shapes):
    h, w, y = make("peaked", (9, 8, 67), torch.float32, device)
    options = {
        "nothing": {},
        "statistics": {"statistics": _rows.filled(impl)},
        "keep_logits_above": {"keep_logits_above": torch.tensor(0.1, device=device)},
    }[more]

    def step(h, w):
        found = head(h, w, y, temperature=0.7, softcap=5.0, logit_scale=0.5, **options)
        weight = 1.0 + sum(x for x in found[3:] if x is not None)
        return (found.logprob * weight - 0.1 * found.entropy).sum()

    torch.compiler.reset()  # one function compiles eight times at most
    results = []
    for function in (
        step,
        torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager"),
    ):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(x, weight)
        loss.backward()
        results.append((loss, x.grad, weight.grad))
    for eager, got in zip(*results, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-7)


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
    found = ek.linear_logprob_entropy(ek.Head(h.double(), w.double(), y), impl="reference")
    assert found.entropy.dtype == torch.float64
    default = ek.linear_logprob_entropy(ek.Head(h, w, y))
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
        logprob_entropy(h, w, y, **options)


def test_values_that_cannot_be_checked_without_synchronising_become_nan():
    """What CUDA sees, called below the check: the row is poisoned, its neighbours are not."""
    h, w, y = make("peaked", (9, 8, 67), torch.float32)
    y[2] = 67
    temperature = torch.ones(9)
    temperature[5:7] = torch.tensor([0.0, torch.inf])
    found = forward(ek.Head(h, w, y, temperature=temperature), keep_logits=False)
    assert found.logprob.isnan().nonzero().flatten().tolist() == [2, 5, 6]
    assert found.entropy.isnan().nonzero().flatten().tolist() == [2, 5, 6]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("output", ["logprob", "entropy", "logsumexp"])
@pytest.mark.parametrize("wrong", ["target", 0.0, torch.inf])
def test_what_becomes_nan_unchecked_is_nan_in_the_gradients(
    impl, device, output, wrong, monkeypatch
):
    """By a gradient that is finite itself: the loss may be of that output alone."""
    if impl == "cpu":
        impl = "torch"  # The compiled kernels never run where nothing is checked.
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    h, w, y = make("peaked", (9, 8, 67), torch.float32, device)
    temperature = torch.ones(9, device=device)
    if wrong == "target":
        y[2] = 67
    else:
        temperature[2] = wrong
    h, w = h.requires_grad_(), w.requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w, y, temperature=temperature), impl=impl)
    getattr(found, output).sum().backward()
    assert h.grad.isnan().any(1).nonzero().flatten().tolist() == [2]
    assert w.grad.isnan().any()
