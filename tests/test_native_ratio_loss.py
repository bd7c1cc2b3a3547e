"""The kernel of ratio_loss, and the torch path beside it: edges, blocks, threads, rounding."""

import functools

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _native
from tests.marks import not_interpreted

WHY_MISSING = _native.why_missing("cpu")
needs_cpu = pytest.mark.skipif(WHY_MISSING is not None, reason=WHY_MISSING or "built")


@pytest.fixture
def ratio_loss(impl):
    return functools.partial(ek.ratio_loss, impl=impl)


EDGES = {
    # log ratio, advantage, options: does the token have a gradient?
    "no clip at all": (0.0, 1.0, {"clip_low": 0.0, "clip_high": 0.0}, True),
    "on the upper clip": (0.0, 2.0, {"clip_low": 0.5, "clip_high": 0.0}, True),
    "on the lower clip": (0.0, -2.0, {"clip_low": 0.0, "clip_high": 0.5}, True),
    "just above": (1e-6, 2.0, {"clip_high": 0.0}, False),
    "just above, negative": (1e-6, -2.0, {"clip_high": 0.0}, True),
    "just below": (-1e-6, -2.0, {"clip_low": 0.0}, False),
    "just below, positive": (-1e-6, 2.0, {"clip_low": 0.0}, True),
    "below the dual clip": (1.0, -1.0, {"dual_clip": 2.72}, True),
    "above the dual clip": (1.0, -1.0, {"dual_clip": 2.71}, False),
    "the dual clip is for negative advantages": (-1.0, 1.0, {"dual_clip": 1.1}, True),
    "on the bound of the log": (20.0, -1.0, {}, True),
    "past it": (20.5, -1.0, {}, False),
    "past it below": (-20.5, 1.0, {}, False),
    "far past it": (torch.inf, -1.0, {}, False),
}


@pytest.mark.parametrize(("log_ratio", "advantage", "options", "active"), EDGES.values(), ids=EDGES)
def test_edges_of_the_clips(ratio_loss, device, log_ratio, advantage, options, active):
    # Neither is above 0, and their difference is exact.
    new, old = (min(log_ratio, 0.0), -max(log_ratio, 0.0))
    if log_ratio == torch.inf:
        new, old = log_ratio, 0.0
    x = torch.tensor([new], device=device, requires_grad=True)
    ones = torch.ones(1, device=device)
    loss, metrics = ratio_loss(x, ones * old, ones * advantage, ones > 0, **options)
    loss.backward()
    ratio = torch.tensor(min(max(log_ratio, -20.0), 20.0), dtype=torch.float64).exp()
    want = -ratio * advantage if active else 0.0
    assert float(x.grad) == pytest.approx(float(want), rel=1e-6)
    assert int(metrics["head/active_rows"]) == active
    assert loss.isfinite()


def large(sequences, length, device="cpu"):
    logprob = -torch.rand(sequences, length) * 3 - 5
    old = logprob + torch.randn(sequences, length) * 10 ** (2 * torch.rand(sequences, length) - 2)
    advantage = torch.randn(sequences, length) * (torch.rand(sequences, length) < 0.9)
    mask = torch.rand(sequences, length) < 0.8
    return [x.to(device) for x in (logprob, old, advantage, mask, mask & (advantage != 0.5))]


SHAPES = [
    *[(1, n) for n in (1, 15, 16, 17, 511, 512, 513, 32768, 32769, 1_000_003)],
    *[(65537, 1), (1, 65537), (3, 40000), (1009, 33)],
]


# What a loss per sequence does with the ends of blocks is the same for all lengths of one sequence.
@pytest.mark.parametrize(
    ("shape", "loss_type"),
    [
        *((shape, "dapo") for shape in SHAPES),
        *((shape, "grpo") for shape in SHAPES if shape[0] > 1 or shape[1] in (1, 512, 513)),
    ],
    ids=str,
)
@not_interpreted
def test_any_shape_is_near_fp64(ratio_loss, device, shape, loss_type):
    """Blocks, parts, threads and their ends; truth is the torch path in fp64."""
    logprob, old, advantage, mask, selected = large(*shape, device)
    options = {"selected": selected, "loss_type": loss_type, "dual_clip": 2.0}
    found = []
    for dtype in (torch.float32, torch.float64):
        x, o, a = (y.detach().to(dtype) for y in (logprob, old, advantage))
        x.requires_grad_()
        op = ratio_loss if dtype == torch.float32 else ek.ratio_loss
        loss, metrics = op(x, o, a, mask, **options)
        loss.backward()
        found.append((loss.detach(), x.grad, metrics))
    (loss, grad, metrics), (true_loss, true_grad, true_metrics) = found
    assert loss.dtype == grad.dtype == torch.float32
    assert true_loss.dtype == true_grad.dtype == torch.float64
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    # A ratio within rounding of a clip may fall on its other side.
    near = (grad == 0) != (true_grad == 0)
    assert near.sum() <= 1 + near.numel() * 1e-5
    torch.testing.assert_close(grad[~near].double(), true_grad[~near], rtol=1e-5, atol=0)
    flips = float(near.sum())
    share = flips / max(float(metrics["tokens/selected"]), 1.0)
    slack = {"head/active_rows": flips, "clip/low": share, "clip/high": share}
    for name, value in true_metrics.items():
        torch.testing.assert_close(
            metrics[name].double(), value.double(), rtol=1e-5, atol=1e-6 + slack.get(name, 0.0)
        )


def test_every_log_ratio_is_exact_to_rounding(ratio_loss, impl, device):
    """exp and exp - 1 - x of the kernel, one token at a time through the metrics."""
    counts = (21, 7) if (impl, device) == ("triton", "cpu") else (301, 50)
    points = torch.linspace(-20, 20, counts[0]), torch.logspace(-6, 0, counts[1])
    log_ratio = torch.cat(points).to(device)
    zero, mask = torch.zeros(1, device=device), torch.ones(1, dtype=torch.bool, device=device)
    for x in log_ratio:
        # Neither is above 0, and their difference is exact.
        new, old = x.clamp_max(0).reshape(1), -x.clamp_min(0).reshape(1)
        metrics = ratio_loss(new, old, zero, mask)[1]
        true = x.double()
        ratio, excess = true.exp(), true.expm1() - true
        eps = torch.finfo(torch.float32).eps
        assert (metrics["ratio/max"] - ratio).abs() <= 1.5 * eps * ratio
        assert (metrics["kl/k3"] - excess).abs() <= 2 * eps * (excess + true.abs())


@not_interpreted
def test_same_bits_twice(ratio_loss, device):
    batch = large(3, 40000, device)
    batch[0].requires_grad_()
    first, second = (ratio_loss(*batch[:4])[0] for _ in "ab")
    assert torch.equal(first, second)
    a, b = (torch.autograd.grad(loss, batch[0])[0] for loss in (first, second))
    assert torch.equal(a, b)


@needs_cpu
def test_same_bits_at_any_number_of_threads():
    """Each part of 32768 tokens is summed by one thread, and parts are merged in order."""
    batch = large(1, 1_000_003)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, metrics = ek.ratio_loss(*batch[:4], impl="cpu")
            found.append([loss, *metrics.values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_cpu
def test_the_kernel_asserts_what_it_cannot_read():
    arguments = [*large(4, 5)[:4], torch.ones(4), 0.2, 0.28, 3.0, 20.0]
    _native.ratio_loss(*arguments)
    for i, wrong in ((0, arguments[0].double()), (3, arguments[0]), (4, torch.ones(5)), (8, 90.0)):
        with pytest.raises(AssertionError):
            _native.ratio_loss(*arguments[:i], wrong, *arguments[i + 1 :])
