"""Liger's call convention: the cases of its own tests of the function, and ours of the rows.

Its cases are its shapes, options and combinations of gradients; truth here is fp64, and its own
fallback for CPUs is what ours may not be worse than.
"""

import pytest
import torch

from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels.integrations.liger import LinearScaledCrossEntropy
from entropy_kernels.testing import peaked_head
from tests.integrations.counted import Counted
from tests.marks import sampled

pytestmark = sampled(0.2)

# [T, D, V]: of Liger's tests aligned, ragged, more than one of its chunks, tiny, prime.
SHAPES = {
    "aligned": (256, 128, 512),
    "ragged": (193, 70, 517),
    "chunks": (521, 7, 13),
    "wide": (192, 96, 257),
    "prime": (17, 31, 257),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def problem(tokens, hidden, vocabulary, dtype=torch.float32, ignore_every=None, ignore_index=-100):
    h = (0.25 * torch.randn(tokens, hidden)).to(dtype)
    w = (torch.randn(vocabulary, hidden) / hidden**0.5).to(dtype)
    y = torch.randint(vocabulary, (tokens,))
    if ignore_every is not None:
        y[::ignore_every] = ignore_index
    return h, w, y


def formula(h, w, y, temperature=1.0, ignore_index=-100, ids=None):
    """NLL, entropy and log-probabilities of `ids`, by all logits, in the dtype of the inputs."""
    logp = (h @ w.T / temperature).log_softmax(1)
    valid = y != ignore_index
    nll = -logp.gather(1, y.where(valid, 0)[:, None]).squeeze(1)
    found = [nll, -(logp.exp() * logp).sum(1)]
    if ids is not None:
        found.append(logp[:, ids])
    return [x * (valid if x.ndim == 1 else valid[:, None]) for x in found]


def with_gradients(function, h, w, incoming):
    """Outputs, and the gradients of h and w for `incoming`, None where an output has none."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    outputs = function(h, w)
    pairs = [(x, g.to(x.dtype)) for x, g in zip(outputs, incoming, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [*(x.detach() for x in outputs), h.grad, w.grad]


def assert_no_worse(h, w, y, incoming, temperature, ignore_index=-100, m_tiles=1):
    """Both outputs and both gradients, against fp64, plain fp32 and Liger's fallback."""
    liger = pytest.importorskip(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", reason="the peer's own fallback"
    )
    options = temperature, ignore_index, m_tiles, True
    ours, rough = (
        with_gradients(lambda h, w, f=f: f.apply(h, w, y, *options), h, w, incoming)
        for f in (LinearScaledCrossEntropy, liger.LigerFusedLinearScaledCrossEntropyFunction)
    )

    def exact(h, w):
        return formula(h, w, y, temperature, ignore_index)

    truth = with_gradients(exact, h.double(), w.double(), incoming)
    plain = worst_of_orders(lambda: with_gradients(exact, h.float(), w.float(), incoming), truth)
    theirs = plain if h.dtype == torch.float32 else rough
    for got, wanted, other, same in zip(ours, truth, theirs, plain, strict=True):
        assert_within_two_bounds(got, wanted, other, same, operands=h.dtype)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nll_entropy_and_gradients(shape, dtype):
    h, w, y = problem(*SHAPES[shape], DTYPES[dtype], ignore_every=7)
    incoming = torch.rand(len(y)) + 0.25, torch.rand(len(y)) - 0.5
    nll, entropy, dh, dw = assert_no_worse(h, w, y, incoming, 0.8)
    assert nll.dtype == entropy.dtype == torch.float32
    assert dh.dtype == dw.dtype == DTYPES[dtype]
    ignored = y == -100
    assert not nll[ignored].any()
    assert not entropy[ignored].any()
    assert not dh[ignored].any()
    assert (nll[~ignored] > 0).all()


@pytest.mark.parametrize("m_tiles", [1, 2, 3])
@pytest.mark.parametrize("ignore_index", [-1, -11])
@pytest.mark.parametrize("temperature", [0.7, 1, 1.5])
def test_options(temperature, ignore_index, m_tiles):
    h, w, y = problem(*SHAPES["ragged"], ignore_every=5, ignore_index=ignore_index)
    incoming = torch.rand(len(y)) + 0.25, torch.rand(len(y)) - 0.5
    assert_no_worse(h, w, y, incoming, temperature, ignore_index, m_tiles)


@pytest.mark.parametrize("which", ["nll", "entropy"])
def test_backward_of_one_output(which):
    h, w, y = problem(*SHAPES["ragged"], ignore_every=7)
    grad = torch.rand(len(y)) - 0.5
    assert_no_worse(h, w, y, (grad, None) if which == "nll" else (None, grad), 0.8)


def test_a_sum_of_many_rows_is_accumulated_in_fp32():
    """With 2048 bf16 rows Liger allows 2%."""
    h, w, y = problem(2048, 256, 512, torch.bfloat16, ignore_every=11)
    incoming = torch.rand(len(y)) + 0.25, None
    *_, dw = assert_no_worse(h, w, y, incoming, 1.0)
    *_, truth = with_gradients(lambda h, w: formula(h, w, y), h.double(), w.double(), incoming)
    assert (dw - truth).abs().mean() < 3e-3 * truth.abs().mean()


def test_ignored_rows_stay_zero_at_large_logits():
    h, w = 20 * torch.randn(128, 64), 20 * torch.randn(256, 64)
    y = torch.full((128,), -100)
    incoming = torch.ones(128), torch.ones(128)
    found = with_gradients(
        lambda h, w: LinearScaledCrossEntropy.apply(h, w, y, 0.1, -100, 1, True), h, w, incoming
    )
    assert not any(x.any() for x in found)


def test_backward_runs_on_the_rows_with_gradient(monkeypatch):
    h, w, y = problem(*SHAPES["wide"], ignore_every=11)
    grad = torch.zeros(len(y))
    grad[::5] = torch.rand(39) + 0.25
    counts = Counted(monkeypatch, 96, 257)
    nll, dh, dw = with_gradients(
        lambda h, w: [LinearScaledCrossEntropy.apply(h, w, y)], h, w, [grad]
    )
    assert counts.backward == [3 * int(((grad != 0) & (y != -100)).sum())]
    assert not dh[grad == 0].any()
    wanted = with_gradients(lambda h, w: formula(h, w, y)[:1], h.double(), w.double(), [grad])
    for got, truth in zip((nll, dh, dw), wanted, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    *leaves, y = problem(64, 16, 33)
    leaves[1 - frozen].requires_grad_()
    nll, entropy = LinearScaledCrossEntropy.apply(*leaves, y, 0.8, -100, 1, True)
    (nll.sum() + entropy.sum()).backward()
    assert leaves[frozen].grad is None
    h64, w64 = (x.detach().double().requires_grad_() for x in leaves)
    sum(x.sum() for x in formula(h64, w64, y, 0.8)).backward()
    got, truth = leaves[1 - frozen].grad, (h64, w64)[1 - frozen].grad
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_of_selected_tokens(dtype, entropy):
    """Their order and duplicates are kept; ignored rows are zero; gradients flow."""
    h, w, y = problem(*SHAPES["ragged"], DTYPES[dtype], ignore_every=7)
    ids = torch.tensor([3, 516, 3, 0])
    grad = torch.randn(len(y), 4)
    incoming = [torch.rand(len(y)), *([None] if entropy else []), grad]
    *outputs, dh, dw = with_gradients(
        lambda h, w: LinearScaledCrossEntropy.apply(h, w, y, 0.8, -100, 1, entropy, ids),
        h,
        w,
        incoming,
    )
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    nll, _, selected = formula(h64, w64, y, 0.8, ids=ids)
    torch.autograd.backward((nll, selected), (incoming[0].double(), grad.double()))
    assert len(outputs) == 2 + entropy
    torch.testing.assert_close(outputs[-1].double(), selected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[-1][:, 0], outputs[-1][:, 2])
    for got, truth in ((dh, h64.grad), (dw, w64.grad)):
        bound = 3 * torch.finfo(DTYPES[dtype]).eps * float(truth.abs().max())
        torch.testing.assert_close(got.double(), truth, rtol=1e-2, atol=max(bound, 1e-6))


def test_an_ignored_target_may_lie_anywhere():
    h, w, y = problem(4, 8, 16)
    y[1] = -100
    assert LinearScaledCrossEntropy.apply(h, w, y)[1] == 0
    y[1] = 99
    assert LinearScaledCrossEntropy.apply(h, w, y, ignore_index=99)[1] == 0


def test_the_reference_has_log_probs_of_chosen_ids_too():
    h, w, y = peaked_head(6, 5, 11)
    ids = torch.tensor([3, 0, 3])
    nll, found = LinearScaledCrossEntropy.apply(h, w, y, selected_token_ids=ids, impl="reference")
    logp = (h @ w.T).log_softmax(1)
    torch.testing.assert_close(found, logp[:, ids])
    torch.testing.assert_close(nll, -logp.gather(1, y[:, None]).squeeze(1))
