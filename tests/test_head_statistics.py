"""Statistics on request of linear_logprob_entropy: their digits, and that they cost others nothing:
no bit of an output, no gradient. test_linear_logprob_entropy.py tests their values too.

T tokens, D hidden, V vocabulary.
"""

import functools
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import _native, _rows
from entropy_kernels.integrations.hf import LogprobEntropyOutput
from entropy_kernels.verification.truth import ROWS, statistics_in
from tests.head_cases import (
    check_statistics,
    logprob_entropy,
    make,
    with_statistics,
)

NAMES = _rows.STATISTICS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"one": (1, 1, 1), "two words": (3, 1, 2), "prime": (31, 37, 97), "one more": (33, 36, 65)}
# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


@pytest.fixture
def head(impl):
    return functools.partial(logprob_entropy, impl=impl)


@pytest.fixture
def vocabulary(impl, device) -> int:
    """Two blocks and a bit: of the torch path's, more of the others'."""
    return 135 if impl == "triton" and device == "cpu" else 2055


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(head, shape, device):
    inputs = make("peaked", shape, torch.float32, device)
    check_statistics(with_statistics(head, *inputs)[3:], *inputs)


def rows_of_logits(V: int) -> dict[str, Tensor]:
    """Rows of logits, and below how they look, in fp64 but exact in fp32."""
    normal = torch.randn(V)
    peak = (-35 + normal).index_fill(0, torch.tensor([V // 2]), 0.0)
    return {
        "normal": normal,
        "steep": 20 * normal,
        "nearly uniform": 1e-3 * normal,
        "uniform": torch.full((V,), -7.25),
        "one word": torch.full((V,), -torch.inf).index_fill(0, torch.tensor([V - 1]), 3.5),
        "few words": normal.where(torch.arange(V) % 61 == 5, -torch.inf),
        "entropy 1e-6": peak.index_fill(0, torch.tensor([V - 2]), -16.5),
        "entropy below 1e-10": peak,
        "two tie": peak.index_fill(0, torch.tensor([V - 1]), 0.0),
        "very negative": -4000 + normal,
        "very large": 4000 + 30 * normal,
        "masked": normal.index_fill(0, torch.arange(V // 3, V - 2), torch.finfo(torch.float32).min),
    }


def test_each_row_keeps_its_digits(head, vocabulary, device, impl):
    """One-hot hidden states pick a column of the weight, so logits are exact, and what is left is
    the statistics' own error, relative to each value.

    varentropy may lose what E[d^2] - E[d]^2 cancels in fp32 sums: about 12 times for the normal
    rows here.
    """
    z = rows_of_logits(vocabulary)
    w = torch.stack(list(z.values()), dim=1).to(device)
    # No 0 * inf.
    w = w.clamp_min(torch.finfo(torch.float32).min)
    T = len(z)
    y = torch.zeros(T, dtype=torch.int64, device=device)
    found = with_statistics(head, torch.eye(T, device=device), w, y)[3:]
    h64 = torch.eye(T, dtype=torch.float64, device=device)
    wanted = statistics_in(torch.float64, h64, w, y)[: len(found)]
    for name, got, want in zip(_rows.filled(impl), found, wanted, strict=True):
        digits = 5e-6 if name == "varentropy" else 1e-6
        error = (got.double() - want).abs()
        # fp64 itself leaves 1e-30 where all logits are equal.
        bad = error > digits * want.abs() + 1e-13
        assert not bad.any(), f"{name}: {dict(zip(z, (error / want.abs()).tolist(), strict=True))}"


@pytest.mark.parametrize("keep_logits", [False, True])
def test_no_other_bit_changes(impl, device, vocabulary, keep_logits):
    results = []
    for names in ((), _rows.filled(impl)):
        h, w, y = make("peaked", (67, 40, vocabulary), torch.bfloat16, device)
        y[::5] = -100
        h, w = h.requires_grad_(), w.requires_grad_()
        found = ek.linear_logprob_entropy(
            ek.Head(h, w, y, temperature=0.9), keep_logits=keep_logits, statistics=names, impl=impl
        )
        assert not any(x.requires_grad for x in found[3:] if x is not None)
        (found.logprob + 0.3 * found.entropy).sum().backward()
        results.append([*found[:3], h.grad, w.grad])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "names",
    [(), ("max_prob",), ["sum_p2", "varentropy"], {"sum_p2", "max_prob"}],
    ids=["none", "one", "list", "set"],
)
def test_what_is_not_asked_for_is_none(impl, device, names):
    h, w, y = make("peaked", (9, 8, 67), torch.float32, device)
    found = ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=names, impl=impl)
    every = ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=_rows.filled(impl), impl=impl)
    for name in NAMES:
        got = getattr(found, name)
        if name in names:
            assert torch.equal(got, getattr(every, name))
        else:
            assert got is None


@pytest.mark.parametrize("names", [("entropy",), ["max_prob", "top2"], "max_prob"], ids=str)
def test_unknown_names_are_refused(names):
    h, w, y = make("peaked", (3, 8, 11), torch.float32)
    with pytest.raises(ValueError, match=f"{', '.join(NAMES)}; got"):
        ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=names)


def test_a_name_that_a_backend_does_not_fill_is_refused(impl, device, monkeypatch):
    own, other = _rows.filled(impl), "torch" if impl != "torch" else "cpu"
    monkeypatch.setattr(_rows, "STATISTICS", (*NAMES, "another"))
    monkeypatch.setattr(_rows, "FILLED", _rows.FILLED | {other: len(NAMES) + 1})
    h, w, y = make("peaked", (3, 8, 11), torch.float32, device)
    words = f'with impl="{impl}", .* {own[-1]}; got another, which impl="{other}" computes'
    with pytest.raises(ValueError, match=words):
        ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=("another", "max_prob"), impl=impl)


def test_a_row_of_the_buffer_that_no_kernel_fills_is_never_returned(impl, device, monkeypatch):
    """A number of FILLED that is raised alone."""
    monkeypatch.setitem(_rows.FILLED, impl, _rows.FILLED[impl] + 1)
    h, w, y = make("peaked", (3, 8, 11), torch.float32, device)
    with pytest.raises((AssertionError, RuntimeError)):
        ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=("max_prob",), impl=impl)


def test_every_statistic_is_a_field_of_the_output():
    assert ek.LogprobEntropy._fields[3:] == NAMES
    assert {field.name for field in fields(LogprobEntropyOutput)} >= set(NAMES)


def test_reference_implementation_takes_fp64():
    h, w, y = make("peaked", (9, 8, 67), torch.float32)
    h = h.double().requires_grad_()
    found = ek.linear_logprob_entropy(ek.Head(h, w.double(), y), statistics=NAMES, impl="reference")
    p = (h @ w.double().T).detach().softmax(1)
    varentropy = (p * p.log().square()).sum(1) - found.entropy.detach().square()
    torch.testing.assert_close(found.varentropy, varentropy)
    torch.testing.assert_close(found.max_prob, p.max(1).values)
    torch.testing.assert_close(found.sum_p2, p.square().sum(1))
    torch.testing.assert_close(found.sum_p2_logp, (p.square() * p.log()).sum(1))
    assert not any(x.requires_grad for x in found[3:])


@pytest.mark.skipif(_native.cpu() is None, reason=_native.why_missing("cpu") or "built")
def test_instruction_sets_and_threads_agree():
    """Every set against fp64, with and without statistics, by one thread and by three."""
    h, w, y = make("peaked", (70, 33, 5003), torch.bfloat16)
    temperature = torch.rand(70) + 0.5
    before = torch.get_num_threads()
    try:
        for isa in _native.cpu().instruction_sets(models=True):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                statistics = torch.full((4, 70), torch.nan)
                head = ek.Head(h, w, y, temperature=temperature, softcap=12.0)
                call = functools.partial(_native.forward, head, keep_logits=False, isa=isa)
                assert all(map(torch.equal, call()[:6], call(statistics=statistics)[:6]))
                check_statistics(statistics, h, w, y, temperature=temperature, softcap=12.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("variant", ["pointer", "tma", "tma_split", "cublas"])
@pytest.mark.parametrize("split", [64, 128], ids=["one block a split", "two"])
@pytest.mark.parametrize("rows", ROWS)
def test_variants_of_triton(variant, split, rows):
    """With one block per split nothing is carried from block to block."""
    tiles = pytest.importorskip("entropy_kernels._triton.common.tiles")
    from entropy_kernels import device
    from entropy_kernels._triton.head_forward.launch import forward

    h, w, y = make(rows, (33, 40, 203), torch.float32, DEVICE)
    if variant not in tiles.variants(device.architecture(h.device), h, w):
        pytest.skip("this variant cannot run on these matrices here")
    statistics = torch.full((4, 33), torch.nan, device=DEVICE)
    call = functools.partial(
        forward,
        ek.Head(h, w, y, temperature=None),
        keep_logits=False,
        tile=tiles.Tile(variant, 32, 64, 32, 4, 1, group_t=2, split_v=split),
    )
    assert all(map(torch.equal, call()[:6], call(statistics=statistics)[:6]))
    check_statistics(statistics, h, w, y)


def test_specialised_warps_have_no_statistics():
    pytest.importorskip("triton", minversion="3.6")
    from entropy_kernels._triton.head_forward.launch import forward

    h, w, y = make("peaked", (3, 8, 16), torch.float32, DEVICE)
    statistics = torch.empty(4, 3, device=DEVICE)
    head = ek.Head(h, w, y, temperature=None)
    with pytest.raises(ValueError, match="variant must be one of"):
        forward(head, keep_logits=False, statistics=statistics, variant="tma_ws")
