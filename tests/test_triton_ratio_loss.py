"""ratio_loss by Triton's kernels: as the torch path, and exact where it must be.

tests/test_ratio_loss.py and tests/test_native_ratio_loss.py hold what all backends have in common.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import entropy_kernels as ek
from entropy_kernels import backends, losses, ops
from entropy_kernels._triton.common import partition
from entropy_kernels._triton.ratio_loss import launch
from entropy_kernels.verification.token_cases import ratio_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

INF = float("inf")
NAN = float("nan")
BOUND = losses.LOG_RATIO_BOUND
EPS = torch.finfo(torch.float32).eps
ratio_loss = functools.partial(ek.ratio_loss, impl="triton")


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


def test_several_blocks_of_each_program_equal_the_torch_path(monkeypatch):
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(partition, "MAX_PROGRAMS", 4)
    *values, _, selected = ratio_batch((3, 101), DEVICE)
    weight = torch.tensor([0.1, 0.7, 0.2], device=DEVICE)
    arguments = (*values, selected, weight, 0.2, 0.28, 3.0, BOUND)
    got, want = (ops.BODIES["ratio_loss"](*arguments, impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_auto_takes_the_kernel_only_where_it_was_found_right(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    resolve = functools.partial(backends.resolve, "ratio_loss")
    for found, name in ((False, "torch"), (True, "triton")):
        monkeypatch.setattr(backends, "verified", lambda op, where, f=found: f and where == gpu)
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
    monkeypatch.setattr(backends, "why_no_triton", lambda: "Triton does not load: gone")
    with pytest.raises(ValueError, match=r'impl="triton" cannot run: Triton does not load: gone'):
        ratio_loss(*values, mask)
