"""Entropies of a sampler's logits against fp64, on every backend, and what they refuse."""

import math

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import backends
from entropy_kernels._torch import sampling
from tests.conftest import BACKENDS, params_of
from tests.marks import sampled

pytestmark = sampled(0.2)

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=params_of(BACKENDS))
def where(request):
    impl, device = request.param
    why = backends.why_not(impl, torch.device(device))
    if why is not None:
        pytest.skip(why)
    return request.param


def rows(vocabulary, dtype=torch.float32):
    """Spread, flat, tied, far below zero, with a mask, and one that is certain but for 1e-9."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(7, vocabulary, generator=generator) * torch.tensor(
        [3.0, 0.0, 1.0, 1.0, 5.0, 1.0, 30.0]
    ).unsqueeze(1)
    logits[2] = logits[2].round()
    logits[3] -= 1e4 if dtype == torch.float32 else 1e3
    logits[4, 1::2] = -math.inf
    logits[5] = -40.0
    logits[5, 0] = 0.0
    return logits.to(dtype)


def truth(logits, temperature):
    """The entropy and the largest |log p| that counts in it, fp64."""
    z = logits.double() / torch.as_tensor(temperature).double().view(-1, 1)
    d = z - z.amax(1, keepdim=True)
    others = d.exp().scatter(1, d.argmax(1, keepdim=True), 0).sum(1)
    t = torch.where(d.isinf(), 0, d * d.exp()).sum(1)
    return others.log1p() - t / (1 + others)


def test_blocks_of_rows_have_their_own_temperatures_and_limits(monkeypatch):
    logits, per_row = rows(301), torch.linspace(0.3, 1.7, 7)
    want = ek.entropy_from_logits(logits, per_row, impl="torch")
    limits = {"top_p": torch.linspace(0.5, 0.99, 7), "top_k": torch.arange(7) + 3}
    kept = ek.truncate(logits, per_row, **limits)
    monkeypatch.setitem(sampling._BLOCK, "cpu", 2 * 301)
    assert torch.equal(ek.entropy_from_logits(logits, per_row, impl="torch"), want)
    others = ek.truncate(logits, per_row, **limits)
    assert torch.equal(others.entropy, kept.entropy)
    assert torch.equal(others.logprob, kept.logprob)


def test_temperatures_need_not_lie_side_by_side(where):
    impl, device = where
    logits = rows(301).to(device)
    strided = torch.linspace(0.3, 1.7, 2 * len(logits), device=device)[::2]
    same = torch.tensor(0.7, device=device).expand(len(logits))
    for temperature in (strided, same, strided.double()):
        got = ek.entropy_from_logits(logits, temperature, impl=impl)
        want = ek.entropy_from_logits(logits, temperature.float().contiguous(), impl=impl)
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 301, 4097])
def test_entropies_are_those_of_fp64(where, vocabulary, dtype):
    impl, device = where
    logits = rows(vocabulary, dtype)
    per_row = torch.linspace(0.3, 1.7, len(logits))
    for temperature in (1.0, 0.6, per_row):
        given = temperature.to(device) if torch.is_tensor(temperature) else temperature
        got = ek.entropy_from_logits(logits.to(device), given, impl=impl)
        assert got.dtype == torch.float32
        want = truth(logits, temperature)
        # Each exponent is rounded, and so is the result: the exponents here go to some hundreds.
        torch.testing.assert_close(got.cpu().double(), want, rtol=40 * EPS, atol=2 * EPS)


def test_small_entropies_keep_their_digits(where):
    impl, device = where
    logits = torch.full((3, 500), -math.inf)
    logits[:, 17] = 5.0
    logits[0, 3], logits[1, 3], logits[2, 3] = -15.0, -25.0, -45.0
    got = ek.entropy_from_logits(logits.to(device), impl=impl).cpu().double()
    want = truth(logits, 1.0)
    assert float(want[2]) < 1e-19
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy
def test_a_row_without_a_distribution_is_nan(where):
    impl, device = where
    logits = torch.zeros(4, 9)
    logits[1] = -math.inf
    logits[2, 3] = math.nan
    logits[3, 3] = math.inf
    got = ek.entropy_from_logits(logits.to(device), impl=impl).cpu()
    assert got.isnan().tolist() == [False, True, True, True]


def test_no_rows_and_a_slice_of_a_wider_matrix(where):
    impl, device = where
    wide = rows(64).to(device)
    assert ek.entropy_from_logits(wide[:0], impl=impl).shape == (0,)
    got = ek.entropy_from_logits(wide[::2, 8:40], impl=impl)
    assert torch.equal(got, ek.entropy_from_logits(wide[::2, 8:40].contiguous(), impl=impl))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(2, 3).double(), {}, "logits must be fp32, bf16 or fp16; got torch.float64"),
        (torch.zeros(4, 3).T, {}, r"logits must be \[R, V\], contiguous along V"),
        (torch.zeros(2, 0), {}, r"of one token or more; got \(2, 0\)"),
        (torch.zeros(2, 3), {"temperature": 0.0}, "temperature must be a finite number > 0"),
        (torch.zeros(2, 3), {"temperature": math.inf}, "temperature must be a finite number > 0"),
        (torch.zeros(2, 3), {"temperature": torch.tensor([1.0, 0.0])}, r"> 0.*got 0 at \(1,\)"),
        (torch.zeros(2, 3), {"impl": "reference"}, "impl must be one of auto, torch"),
    ],
)
def test_bad_input_is_refused(logits, options, message):
    with pytest.raises(ValueError, match=message):
        ek.entropy_from_logits(logits, **options)


def test_temporary_memory_is_bounded(monkeypatch):
    """No operation of the torch path makes a tensor as large as many blocks of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from entropy_kernels._torch import sampling

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if torch.is_tensor(result) and not func.is_view:
                self.most = max(self.most, result.numel())
            return result

    monkeypatch.setitem(sampling._BLOCK, "cpu", 1000)
    logits = torch.randn(300, 90)
    with Largest() as seen:
        ek.entropy_from_logits(logits, impl="torch")
    assert seen.most <= 1000
