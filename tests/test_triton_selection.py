"""The threshold and the exact selection by Triton's kernels, bit for bit as the other paths."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.ours import selected_by
from entropy_kernels import (
    _radix,
    backends,
    entropy_threshold,
    ops,
    reference,
    top_entropy_mask,
)
from entropy_kernels._torch import selection
from entropy_kernels._triton.common import partition
from entropy_kernels._triton.selection import launch
from entropy_kernels.verification import first_use
from entropy_kernels.verification import token_cases as cases
from entropy_kernels.verification.record import Answer
from entropy_kernels.verification.token_cases import KINDS, assert_same_bits
from tests.selection_cases import VALUES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")

INF = float("inf")
NAN = float("nan")
select = partial(selected_by, "triton")
assert_as_the_sort = partial(cases.assert_as_the_sort, "triton")
values_of, masks_of = (partial(f, device=DEVICE) for f in (cases.values_of, cases.masks_of))
DIGITS = [(21, 11, 0), (10, 11, 11), (0, 10, 22), (13, 19, 0)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Few values make several programs with several blocks each."""
    monkeypatch.setattr(launch, "HISTOGRAM_BLOCK", 128)
    monkeypatch.setattr(launch, "LARGEST_BLOCK", 128)
    monkeypatch.setattr(partition, "MAX_PROGRAMS", 2)


@settings(deadline=None, max_examples=10)
@given(
    tokens=st.lists(st.tuples(VALUES, st.booleans()), max_size=40),
    fraction=st.sampled_from([0.2, 0.55, 1.0, 1e-9]),
)
def test_equals_the_sort(tokens, fraction):
    values = torch.tensor([value for value, _ in tokens], dtype=torch.float32, device=DEVICE)
    mask = torch.tensor([valid for _, valid in tokens], dtype=torch.bool, device=DEVICE)
    for valid in (None, mask):
        assert_as_the_sort(values, valid, fraction)


def test_blocks_as_shipped():
    block = launch.HISTOGRAM_BLOCK
    for n in (block - 1, 2 * block + 1):
        assert_as_the_sort(values_of("distinct", n), masks_of(n)[1], 0.2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["tied", "equal", "broken"])
@pytest.mark.parametrize(("shift", "bits", "prefix_bits"), DIGITS)
def test_counts_are_those_of_the_torch_path(kind, shift, bits, prefix_bits):
    """With the prefix of most values and of few: a block is counted at once, or value by value."""
    values = values_of(kind, 300)
    keys = (selection.sort_keys(values) ^ selection.SIGN).to(torch.int64) & 0xFFFFFFFF
    heads = torch.cat([keys.mode().values[None], keys[:1], keys.max()[None] + 1])
    for prefix in heads >> (32 - prefix_bits):
        for mask in masks_of(300)[:2]:
            arguments = (values, mask, prefix, shift, bits, prefix_bits)
            got = ops.radix_histogram(*arguments, "triton")
            assert_same_bits(got, ops.radix_histogram(*arguments, "torch"))


@pytest.mark.parametrize("bits", [10, 11])
def test_picks_are_those_of_the_torch_path(bits):
    """Also for counts beyond 32 bits, one bin and none; for ranks 0, 1 and above."""
    bins = 1 << bits
    many = torch.randint(0, 2**40, (bins,), device=DEVICE)
    sparse = torch.where(torch.arange(bins, device=DEVICE) % 97 == 3, many, 0)
    one = torch.zeros_like(many).index_fill_(0, torch.tensor([bins - 1], device=DEVICE), 7)
    for counts in (many, sparse, one, torch.zeros_like(many)):
        prefix, n = torch.tensor(5, device=DEVICE), counts.sum()
        local = counts // 3
        for remaining in (None, n, n // 2, (n > 0).long()):
            for fraction in (0.2, 0.55, 1.0, 1e-9) if remaining is None else (0.2,):
                arguments = (counts, local, prefix, remaining, fraction, 32 - 4 - bits)
                got = ops.radix_pick(*arguments, "triton")
                for x, y in zip(got, ops.radix_pick(*arguments, "torch"), strict=True):
                    assert_same_bits(x, y)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("kind", "threshold"),
    [
        ("zeros", 0.0),
        ("zeros", -0.0),
        ("tied", 1.0),
        ("broken", INF),
        ("broken", NAN),
        ("tied", NAN),
    ],
)
def test_any_threshold_and_quota(kind, threshold):
    values = values_of(kind, 400)
    threshold = torch.tensor(threshold, device=DEVICE)
    for quota in (-5, 0, 1, 70, 10**10):
        for mask in masks_of(400)[:2]:
            arguments = (values, mask, threshold, torch.tensor(quota, device=DEVICE))
            got = ops.select_largest(*arguments, "triton")
            assert torch.equal(got, ops.select_largest(*arguments, "torch"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["distinct", "tied", "equal", "broken"])
@pytest.mark.parametrize("shares", [[300], [150, 0], [101, 0, 200], [0, 0]], ids=str)
def test_ranks_select_together(kind, shares):
    """Each rank picks from summed histograms; ties go to the lower rank, then the lower index."""
    values, mask = values_of(kind, sum(shares)), masks_of(sum(shares))[1]
    ranks = [*zip(values.split(shares), mask.split(shares), strict=True)]
    found = [(torch.zeros((), dtype=torch.int64, device=DEVICE), None, None, None)] * len(ranks)
    prefix_bits = 0
    for shift, bits in selection.PASSES:
        digit = (shift, bits, prefix_bits, "triton")
        local = [
            ops.radix_histogram(*rank, state[0], *digit)
            for rank, state in zip(ranks, found, strict=True)
        ]
        total = torch.stack(local).sum(0)
        found = [
            ops.radix_pick(total, counts, state[0], state[1], 0.2, shift, "triton")
            for counts, state in zip(local, found, strict=True)
        ]
        prefix_bits += bits
    keep, before = [], 0
    for rank, (_, quota, equal, threshold) in zip(ranks, found, strict=True):
        keep.append(ops.select_largest(*rank, threshold, quota - before, "triton"))
        before = before + equal
    want = reference.top_entropy_mask(values.cpu(), mask.cpu(), 0.2)
    assert torch.equal(torch.cat(keep).cpu(), want)


@pytest.mark.usefixtures("small_blocks")
def test_chunks_are_selected_together():
    values, mask = values_of("tied", 500), masks_of(500)[1]
    chunks = [*zip(values.split([300, 0, 200]), mask.split([300, 0, 200]), strict=True)]
    together = _radix.kth_largest(chunks, 0.2, None, "triton")
    for x, y in zip(together, _radix.kth_largest(chunks, 0.2, None, "torch"), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("mask", [None, torch.arange(100, device=DEVICE) % 3 > 0])
def test_opcheck(mask):
    values = torch.randn(100, device=DEVICE)
    prefix = torch.tensor(0b10000000000, device=DEVICE)
    counts = torch.randint(0, 9, (2048,), device=DEVICE)
    threshold, quota = torch.tensor(0.5, device=DEVICE), torch.tensor(3, device=DEVICE)
    check = torch.library.opcheck
    check(ops.radix_histogram, (values, mask, prefix, 10, 11, 11, "triton"))
    check(ops.radix_pick, (counts, counts, torch.zeros_like(prefix), None, 0.2, 21, "triton"))
    check(ops.radix_pick, (counts, counts, prefix, quota, 0.2, 10, "triton"))
    check(ops.select_largest, (values, mask, threshold, quota, "triton"))


@pytest.mark.usefixtures("unchecked_shapes")
def test_compiles_into_one_graph():
    values, mask = values_of("tied", 300), masks_of(300)[1]
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(values, mask, 0.2), select(values, mask, 0.2), strict=True):
        assert_same_bits(got, want)


def test_auto_takes_a_kernel_only_where_it_was_found_right(monkeypatch):
    """Never on a CPU, where the interpreter would run it."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for found, name in ((False, "torch"), (True, "triton")):
        monkeypatch.setattr(first_use, "right", lambda *call, f=found: Answer(f))
        assert backends.resolve("selection", "auto", gpu) == name
        assert backends.resolve("selection", "auto", cpu) in ("torch", "cpu")
    assert backends.resolve("selection", "triton", cpu) == "triton"


def test_without_triton_the_torch_path_is_taken(monkeypatch):
    monkeypatch.setattr(backends, "why_no_triton", lambda: "Triton does not load: gone")
    assert backends.resolve("selection", "auto", torch.device("cuda", 0)) == "torch"
    assert backends.why_not("triton", torch.device("cuda", 0)) == "Triton does not load: gone"


@needs_gpu
def test_in_a_cuda_graph(monkeypatch):
    """A graph captured once selects among the values of each replay; nothing waits."""
    monkeypatch.setattr(backends, "verified", lambda *call: True)
    n = 300_007
    entropy, mask = values_of("distinct", n), masks_of(n)[1]
    top_entropy_mask(entropy, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        threshold, keep = entropy_threshold(entropy, mask), top_entropy_mask(entropy, mask)
    for kind in KINDS:
        entropy.copy_(values_of(kind, n))
        graph.replay()
        assert_same_bits(threshold.cpu(), reference.entropy_threshold(entropy.cpu(), mask.cpu()))
        assert torch.equal(keep.cpu(), reference.top_entropy_mask(entropy.cpu(), mask.cpu()))
