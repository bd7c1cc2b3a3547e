"""impl="cuda" from the package's ops to the kernels' text, on fibers of the CPU.

The head's launchers, the rows that they number and the merge are real. Its products and sums of
tiles are plain loops of ops_host.cpp.

T tokens, D hidden, V vocabulary.
"""

import ctypes

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _radix, ops
from entropy_kernels._cuda_kernels import head
from entropy_kernels._cuda_kernels import module as cuda_module
from entropy_kernels.verification import checks, token_cases
from tests import cuda_extension
from tests.marks import nan_is_meant

from . import host

pytest.importorskip("triton")

from entropy_kernels._triton.common import cutlass, tiles
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels.verification.question import Question

pytestmark = nan_is_meant
CPU = torch.device("cpu")
KERNELS = ("selection.cu", "ratio_loss.cu", "merge.cu")
TILE = Tile("cutlass", 32, 64, 64, 4, 1)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    sources = [host.HERE / "ops_host.cpp", *(host.SOURCES / name for name in KERNELS)]
    path = host.build(tmp_path_factory.mktemp("ops"), sources, library=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(autouse=True)
def extension(library, monkeypatch):
    """The extension is the library, and its kernels take tensors on the CPU."""

    def run(name, given):
        function = getattr(library, f"ek_{name}")
        function.argtypes = [
            ctypes.POINTER(kind) if issubclass(kind, ctypes.Structure) else kind
            for kind in cuda_extension.calls()[name].values()
        ]
        return function(*given.values())

    monkeypatch.setattr(cuda_module, "why_not", lambda where: None)
    monkeypatch.setattr(cutlass.device, "architecture", lambda where: "interpreter")
    monkeypatch.setitem(head._RUNS, "interpreter", 80)
    return cuda_extension.install(monkeypatch, cuda_extension.Extension(run))


@pytest.mark.parametrize("op", ["selection", "ratio_loss"])
def test_the_check_of_a_gpu_passes(op, extension):
    question = Question(op, torch.float32, flags=("cuda",))
    for case in checks.cases(question, CPU, checks.Sizes(), None, thorough=True):
        case.run()
    own = {"ratio_loss"}
    if op == "selection":
        own = {"radix_histogram", "radix_pick", "select_largest", "top"}
    assert {*extension.launched} == own


@pytest.mark.parametrize("kind", token_cases.KINDS)
@pytest.mark.parametrize("fraction", [0.2, 0.55, 1.0])
def test_one_launch_selects_as_many_do(kind, fraction, extension):
    values = token_cases.values_of(kind, 700, CPU)
    for mask in (None, torch.arange(700) % 3 > 0, torch.zeros(700, dtype=torch.bool)):
        found = ops.top(values, mask, fraction, True)
        want = _radix.kth_largest([(values, mask)], fraction, None, "torch")
        for got, other in zip(found[:3], want, strict=True):
            token_cases.assert_same_bits(got, other)
        wanted = ek.top_entropy_mask(values, mask, fraction, impl="torch")
        assert torch.equal(found[3], wanted)
        assert torch.equal(ek.top_entropy_mask(values, mask, fraction, impl="cuda"), wanted)
        masks = [None, None] if mask is None else mask.split(350)
        chunks = [*zip(values.split(350), masks, strict=True)]
        together = _radix.kth_largest(chunks, fraction, None, "cuda")
        for got, other in zip(together, want, strict=True):
            token_cases.assert_same_bits(got, other)


@pytest.mark.parametrize("mask", [None, torch.arange(100) % 3 > 0])
def test_opcheck(mask):
    values, prefix = torch.randn(100), torch.tensor(0b10000000000)
    counts = torch.randint(0, 9, (2048,))
    threshold, quota = torch.tensor(0.5), torch.tensor(3)
    check = torch.library.opcheck
    for select in (False, True):
        check(ops.top, (values, mask, 0.2, select))
    check(ops.radix_histogram, (values, mask, prefix, 10, 11, 11, "cuda"))
    check(ops.radix_pick, (counts, counts, torch.zeros_like(prefix), None, 0.2, 21, "cuda"))
    check(ops.radix_pick, (counts, counts, prefix, quota, 0.2, 10, "cuda"))
    check(ops.select_largest, (values, mask, threshold, quota, "cuda"))
    tokens = [torch.randn(2, 9) for _ in range(3)]
    arguments = (*tokens, tokens[0] > 0, torch.ones(2), 0.2, 0.28, None, 20.0, "cuda")
    check(ops.ratio_loss, arguments)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_selection_compiles_into_one_graph():
    values, mask = token_cases.values_of("tied", 300, CPU), torch.arange(300) % 3 > 0

    def select(values, mask):
        threshold = ek.entropy_threshold(values, mask, impl="cuda")
        return threshold, ek.top_entropy_mask(values, mask, impl="cuda")

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(values, mask), select(values, mask), strict=True):
        token_cases.assert_same_bits(got, want)


FLAGS = [
    (),
    ("bias", "temperature", "softcap", "statistics", "odd V"),
    ("keep_logits",),
]


@pytest.mark.parametrize("flags", FLAGS, ids="+".join)
def test_the_check_of_a_forward_passes(flags, extension):
    question = Question("forward", torch.bfloat16, TILE, flags)
    for case in checks.cases(question, CPU, checks.Sizes(hidden=16), None, thorough=False):
        case.run()
    assert {"forward", "merge"} == set(extension.launched)


@pytest.mark.parametrize("flags", [(), ("bias", "temperature", "softcap", "odd V")], ids="+".join)
def test_the_check_of_a_backward_passes(flags, extension):
    question = Question("dlogits", torch.bfloat16, TILE, flags)
    for case in checks.cases(question, CPU, checks.Sizes(hidden=16), TILE, thorough=False):
        case.run()
    assert {"forward", "merge", "dlogits"} == set(extension.launched)


def test_the_check_of_rows_that_are_read_passes(extension):
    """Their logits are Triton's, which stores them, and csrc/cuda recomputes the others."""
    key = tiles.Key("forward", "interpreter", "any", tiles.ANY, tiles.ANY)
    (storing,) = [tile for tile in tiles.TILES[key] if tile.variant == "cublas"]
    question = Question("dlogits", torch.bfloat16, TILE, ("bias", "stored"))
    for case in checks.cases(question, CPU, checks.Sizes(hidden=16), storing, thorough=False):
        case.run()
    assert set(extension.launched) == {"dlogits"}


def test_a_step_of_the_loss(extension, monkeypatch):
    """All of it at once, as impl="torch"."""
    table = {key: (TILE,) for key in cutlass.TILES if key.architecture == "sm_80"}
    monkeypatch.setattr(cutlass, "TILES", table)
    T, D, V = 37, 16, 150
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D).bfloat16(), torch.randn(V, D).bfloat16()
    given = torch.randint(V, (T,)), torch.full((T,), -3.0), torch.randn(T)
    results = []
    for impl in ("cuda", "torch"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        mask = torch.arange(T) % 4 > 0
        target, old, advantage = given
        loss, metrics = ek.high_entropy_policy_loss(
            ek.Head(h, w, target), old, advantage, mask, backend=ek.Backend(impl)
        )
        loss.backward()
        results.append((loss.detach(), h.grad.float(), w.grad.float(), metrics))
    (loss, dh, dw, metrics), (other, dh_other, dw_other, metrics_other) = results
    assert extension.launched == ["forward", "merge", "top", "ratio_loss", "dlogits"]
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh, dh_other, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(dw, dw_other, rtol=2e-2, atol=1e-3)
    assert metrics.keys() == metrics_other.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value, metrics_other[name], rtol=1e-4, atol=1e-5)
