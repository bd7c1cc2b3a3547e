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
from tests.marks import sampled

NAMES = _rows.STATISTICS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"one": (1, 1, 1), "two words": (3, 1, 2), "prime": (31, 37, 97), "one more": (33, 36, 65)}
# numpy, which computes in Triton's interpreter, warns of NaN and infinities that are meant.
pytestmark = [sampled(0.2), pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]


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
        ek.linear_logprob_entropy(ek.Head(h, w, y), statistics=NAMES, impl=impl)


def equal_logits(shape: tuple[int, int, int], dtype: torch.dtype, device: str, forbids: bool):
    """Hidden states, weight and bias of small integers, whose logits are exact; many are equal.

    forbids: whether there is a bias, with words of -inf; otherwise it is None. Half of the targets
    are the first maximum of their row, a quarter the last one.
    """
    T, D, V = shape
    h = torch.randint(-2, 3, (T, D)).index_fill(0, torch.arange(0, T, 7), 0)
    w = torch.randint(-1, 2, (max(V // 3, 1), D)).repeat(4, 1)[:V]
    bias = torch.randint(-2, 3, (V,)).double().index_fill(0, torch.arange(0, V, 5), -torch.inf)
    z = (h @ w.T).double() + (bias if forbids else 0.0)
    first, last = z.argmax(1), V - 1 - z.flip(1).argmax(1)
    kind = torch.arange(T) % 4
    y = torch.where(kind < 2, first, torch.where(kind == 2, last, torch.randint(V, (T,))))
    h, w, bias = (x.to(device, dtype) for x in (h, w, bias))
    return h, w, y.to(device), bias if forbids else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 50.0},
        {"logit_scale": 0.37},
        {"temperature": "per token"},
        {"bias": True},
        {"bias": True, "softcap": 50.0, "temperature": "per token", "logit_scale": 0.37},
    ],
    ids=lambda o: "+".join(o) or "none",
)
def test_mean_logit_and_is_top1_are_those_of_fp64(head, impl, vocabulary, device, dtype, options):
    """Also where the target ties with a word before it or behind it, and with forbidden words."""
    options = dict(options)
    forbids = options.pop("bias", False)
    h, w, y, bias = equal_logits((70, 9, vocabulary), dtype, device, forbids)
    if "temperature" in options:
        options["temperature"] = torch.rand(70, device=device) + 0.5
    y[::11] = -100
    before = torch.get_num_threads()
    try:
        # The compiled kernels divide a vocabulary among threads.
        for threads in (1, 3) if impl == "cpu" else (before,):
            torch.set_num_threads(threads)
            found = head(h, w, y, bias=bias, statistics=("is_top1", "mean_logit"), **options)
            check_mean_logit_and_is_top1(found, h, w, y, bias, **options)
    finally:
        torch.set_num_threads(before)


def check_mean_logit_and_is_top1(
    found, h, w, y, bias, logit_scale=1.0, softcap=None, temperature=1.0
):
    b = 0.0 if bias is None else bias.double()
    z = (h.double() @ w.double().T + b) * logit_scale
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    z = z / torch.as_tensor(temperature, device=z.device).reshape(-1, 1)
    assert found.is_top1.dtype == torch.bool
    assert torch.equal(found.is_top1, (z.argmax(1) == y) & (y != -100))
    assert 0.2 < found.is_top1.float().mean() < 0.8
    mean = z.mean(1).masked_fill(y == -100, 0.0)
    torch.testing.assert_close(found.mean_logit, mean.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("place", [0, 1, 64, 96, -1])
def test_is_top1_of_every_place(head, vocabulary, device, place):
    """The target's column at the edges of tiles; ties before it, behind it and nowhere."""
    w = torch.zeros(vocabulary, 4)
    w[place] = 1.0
    place %= vocabulary
    w[(place + 5) % vocabulary, 1] = w[(place - 3) % vocabulary, 2] = 1.0
    behind, before = place + 5 < vocabulary, place - 3 >= 0
    # The weight's columns: the target alone, with one behind (or first of all), with one before it.
    h = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    w[place, 1:] = 0.0
    y = torch.full((5,), place)
    found = head(h.to(device), w.to(device), y.to(device), statistics=("is_top1",)).is_top1
    assert found.tolist() == [True, behind, not before, False, place == 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_an_answer_has_no_mean_logit_and_is_not_top1(head, device, value):
    h, w, _ = make("peaked", (9, 8, 67), torch.float32, device)
    w[:, 2] = w[:, 2].abs() + 1
    clean = head(h, w, (h @ w.T).argmax(1), statistics=NAMES)
    h[4, 2] = value
    found = head(h, w, (h @ w.T).argmax(1), statistics=NAMES)
    others = torch.arange(9, device=device) != 4
    assert clean.is_top1.all()
    assert torch.equal(found.is_top1, others)
    assert torch.equal(found.mean_logit.isnan(), ~others)


def test_many_logits_of_the_lowest_number_have_a_mean(head, vocabulary, device):
    """Their sum exceeds fp32."""
    lowest = torch.finfo(torch.float32).min
    w = torch.full((vocabulary, 1), lowest, device=device)
    w[3] = 1.0
    y = torch.full((2,), 3, device=device)
    found = head(torch.ones(2, 1, device=device), w, y, statistics=("mean_logit", "is_top1"))
    want = lowest * (1 - 1 / vocabulary)
    torch.testing.assert_close(found.mean_logit, torch.full((2,), want, device=device))
    assert found.is_top1.all()


def test_every_statistic_is_a_field_of_the_output():
    assert ek.LogprobEntropy._fields[3:-1] == NAMES
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
    torch.testing.assert_close(found.mean_logit, (h @ w.double().T).detach().mean(1))
    assert torch.equal(found.is_top1, p.argmax(1) == y)
    assert not any(x.requires_grad for x in found[3:-1])


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
                statistics = torch.full((6, 70), torch.nan)
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
    statistics = torch.full((6, 33), torch.nan, device=DEVICE)
    call = functools.partial(
        forward,
        keep_logits=False,
        tile=tiles.Tile(variant, 32, 64, 32, 4, 1, group_t=2, split_v=split),
        per_split=split // 64,
    )
    head = ek.Head(h, w, y, temperature=None)
    assert all(map(torch.equal, call(head)[:6], call(head, statistics=statistics)[:6]))
    check_statistics(statistics, h, w, y)
    if rows == "tied":
        h, w, y, _ = equal_logits((33, 8, 203), torch.float32, DEVICE, forbids=False)
        call(ek.Head(h, w, y, temperature=None), statistics=statistics)
        assert torch.equal(statistics[5] == 1, (h @ w.T).argmax(1) == y)


def test_specialised_warps_have_no_statistics():
    pytest.importorskip("triton", minversion="3.6")
    from entropy_kernels._triton.head_forward.launch import forward

    h, w, y = make("peaked", (3, 8, 16), torch.float32, DEVICE)
    statistics = torch.empty(6, 3, device=DEVICE)
    head = ek.Head(h, w, y, temperature=None)
    with pytest.raises(ValueError, match="variant must be one of"):
        forward(head, keep_logits=False, statistics=statistics, variant="tma_ws")
