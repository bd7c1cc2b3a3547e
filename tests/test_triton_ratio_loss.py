"""ratio_loss by Triton's kernels: within two bounds of fp64, and exact where it must be."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import entropy_kernels as ek
from entropy_kernels import backends, losses, ops
from entropy_kernels._triton.common import partition
from entropy_kernels._triton.ratio_loss import launch
from tests.token_kernel_cases import loss_and_gradient, ratio_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

INF = float("inf")
NAN = float("nan")
BOUND = losses.LOG_RATIO_BOUND
EPS = torch.finfo(torch.float32).eps
ratio_loss = functools.partial(ek.ratio_loss, impl="triton")


@pytest.fixture
def small_blocks(monkeypatch):
    """Few tokens make several programs with several blocks each."""
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(partition, "MAX_PROGRAMS", 4)


# Away from the clips, where exp may round to either side of them; and on them.
LOG_RATIOS = st.sampled_from([0.0, 0.1, -0.1, 1.0, -1.0, 5.0, 20.0, -20.0, 20.5, -21.0, INF, NAN])
ADVANTAGES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, -2.5, NAN])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@settings(deadline=None, max_examples=30)
@given(
    tokens=st.lists(st.tuples(LOG_RATIOS, ADVANTAGES, st.booleans()), max_size=12),
    clips=st.sampled_from([(0.2, 0.28, None), (0.0, 0.0, 3.0), (1.0, 0.28, 1.5), (0.0, 0.5, None)]),
)
def test_equals_the_torch_path(tokens, clips):
    """Which gradients are zero or NaN, all counts, and whether the sums are NaN: exactly."""
    columns = [[token[i] for token in tokens] for i in range(2)]
    logprob, advantage = (torch.tensor([c], dtype=torch.float32, device=DEVICE) for c in columns)
    kept = torch.tensor([[token[2] for token in tokens]], dtype=torch.bool, device=DEVICE)
    weight = torch.tensor([0.37], device=DEVICE)
    arguments = (logprob, torch.zeros_like(logprob), advantage, kept, weight, *clips, BOUND)
    got, want = (ops.BODIES["ratio_loss"](*arguments, impl) for impl in ("triton", "torch"))
    for x, y in ((got[0], want[0]), (got[2], want[2])):
        assert torch.equal(x.isnan(), y.isnan())
    torch.testing.assert_close(got[1], want[1], rtol=4 * EPS, atol=0, equal_nan=True)
    assert torch.equal(got[1] == 0, want[1] == 0)
    assert torch.equal(got[3], want[3])


def test_every_log_ratio_is_exact_to_rounding():
    """exp and exp - 1 - x of the kernel, one token at a time through the metrics."""
    log_ratio = torch.cat([torch.linspace(-20, 20, 21), torch.logspace(-6, 0, 7)]).to(DEVICE)
    zero, mask = torch.zeros(1, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    for x in log_ratio:
        # Neither is above 0, and their difference is exact.
        new, old = x.clamp_max(0).reshape(1), -x.clamp_min(0).reshape(1)
        metrics = ratio_loss(new, old, zero, mask)[1]
        true = x.double()
        ratio, excess = true.exp(), true.expm1() - true
        assert (metrics["ratio/max"] - ratio).abs() <= 1.5 * EPS * ratio
        assert (metrics["kl/k3"] - excess).abs() <= 2 * EPS * (excess + true.abs())


def test_what_is_not_selected_may_be_anything():
    logprob, old, advantage, mask, selected = ratio_batch((2, 50), DEVICE)
    want = loss_and_gradient(ratio_loss, logprob, old, advantage, mask, selected=selected)[:2]
    for value in (NAN, INF, -INF):
        dirty = [x.masked_fill(~(mask & selected), value) for x in (logprob, old, advantage)]
        got = loss_and_gradient(ratio_loss, *dirty, mask, selected=selected)[:2]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_selected_nan_is_seen():
    """On a CPU wrong data raise earlier: see tests/test_ratio_loss.py."""
    for i in range(1 if DEVICE == "cpu" else 3):
        *values, mask, _ = ratio_batch((2, 50), DEVICE)
        mask[0, 3] = True
        values[2][0, 3] = 1.0
        values[i][0, 3] = NAN
        loss, grad, metrics = loss_and_gradient(ratio_loss, *values, mask)
        assert loss.isnan()
        assert grad.isnan().nonzero().tolist() == [[0, 3]]
        names = ("ratio/mean", "ratio/max", "kl/k1", "kl/k3")
        assert all(metrics[name].isnan() == (i < 2) for name in names)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5)], ids=str)
def test_no_token_gives_zeros(shape):
    logprob, old, advantage, mask, _ = ratio_batch(shape, DEVICE)
    kept = torch.zeros_like(mask)
    weight = torch.ones(shape[0], device=DEVICE)
    arguments = (logprob, old, advantage, kept, weight, 0.2, 0.28, None, BOUND)
    loss, grad, sums, counts = ops.BODIES["ratio_loss"](*arguments, "triton")
    assert loss == 0
    assert grad.shape == shape
    assert not any(x.any() for x in (grad, sums, counts))


@pytest.mark.usefixtures("small_blocks")
def test_strided_inputs_and_repetition():
    """The same bits, twice and of inputs that are not contiguous."""
    logprob, *rest, selected = ratio_batch((3, 101), DEVICE)
    want = loss_and_gradient(ratio_loss, logprob, *rest, selected=selected, loss_type="grpo")
    for layout in (
        torch.clone,
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x] * 2, 2)[..., 0],
    ):
        strided = [layout(x) for x in (logprob, *rest)]
        got = loss_and_gradient(ratio_loss, *strided, selected=layout(selected), loss_type="grpo")
        assert all(torch.equal(g, w) for g, w in zip(got[:2], want[:2], strict=True))
        assert all(torch.equal(got[2][name], want[2][name]) for name in want[2])


def op_arguments(logprob, old, advantage, mask, _):
    weight = torch.rand(logprob.shape[0], device=DEVICE)
    return logprob, old, advantage, mask, weight, 0.2, 0.28, 3.0, BOUND


@pytest.mark.usefixtures("unchecked_shapes")
def test_opcheck():
    logprob, *rest = ratio_batch((3, 11), DEVICE)
    op = torch.ops.entropy_kernels.ratio_loss.default
    torch.library.opcheck(op, (*op_arguments(logprob.requires_grad_(), *rest), "triton"))


@pytest.mark.usefixtures("unchecked_shapes")
def test_compiles_into_one_graph():
    arguments = ratio_batch((3, 11), DEVICE)[:4]
    compiled = torch.compile(ratio_loss, fullgraph=True, backend="aot_eager")
    got, want = (loss_and_gradient(op, *arguments)[:2] for op in (compiled, ratio_loss))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_auto_takes_the_kernel_only_where_it_was_found_right(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    resolve = functools.partial(backends.resolve, "ratio_loss")
    for found, name in ((False, "torch"), (True, "triton")):
        monkeypatch.setattr(backends, "verified", lambda device, f=found: f and device == gpu)
        assert resolve("auto", gpu, torch.float32) == name
        assert resolve("auto", gpu, torch.float64) == "torch"
        assert resolve("auto", cpu, torch.float32) != "triton"


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_the_kernel_cannot_do_is_refused(monkeypatch):
    *values, mask, _ = ratio_batch((2, 5), DEVICE)
    with pytest.raises(ValueError, match=r'impl="triton" needs fp32 tensors; got torch.float64'):
        ratio_loss(*(x.double() for x in values), mask)
    with pytest.raises(ValueError, match=r'impl="triton" cannot run: .* got meta'):
        ratio_loss(*(x.to("meta") for x in (*values, mask)))
    monkeypatch.setattr(backends, "_why_no_triton", lambda: "Triton does not load: gone")
    with pytest.raises(ValueError, match=r'impl="triton" cannot run: Triton does not load: gone'):
        ratio_loss(*values, mask)
