"""top_entropy_mask: which tokens are trained on, against the sort of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import ProcessGroup

from entropy_kernels import entropy_threshold, ops, reference, top_entropy_mask
from entropy_kernels._torch import selection
from tests.selection_cases import FRACTIONS, VALUES

INF = float("inf")
NAN = float("nan")


def assert_as_reference(entropy, mask, fraction, **options):
    actual = top_entropy_mask(entropy, mask, fraction, **options)
    expected = reference.top_entropy_mask(entropy, mask, fraction, **options)
    assert actual.shape == entropy.shape
    assert torch.equal(actual, expected), (entropy, mask, fraction, options)


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.tuples(VALUES, st.booleans()), max_size=40),
    fraction=st.sampled_from(FRACTIONS),
    which=st.sampled_from(["top", "bottom"]),
    ties=st.sampled_from(["exact", "threshold"]),
    scope=st.sampled_from(["batch", "sequence"]),
)
def test_equals_the_sort(tokens, fraction, which, ties, scope):
    pairs = tokens[: len(tokens) // 2 * 2]
    entropy = torch.tensor([value for value, _ in pairs], dtype=torch.float32).view(2, -1)
    mask = torch.tensor([valid for _, valid in pairs], dtype=torch.bool).view(2, -1)
    for valid in (None, mask):
        assert_as_reference(entropy, valid, fraction, which=which, ties=ties, scope=scope)


@pytest.mark.usefixtures("selection_backend")
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("shape", [(0,), (1, 1), (7, 0), (3, 101)])
def test_shapes(shape, fraction):
    generator = torch.Generator().manual_seed(0)
    tied = torch.randint(0, 9, shape, generator=generator).float()
    mask = torch.rand(shape, generator=generator) < 0.7
    for valid in (None, mask, torch.zeros(shape, dtype=torch.bool)):
        for which in ("top", "bottom"):
            assert_as_reference(tied, valid, fraction, which=which)
            assert_as_reference(tied, valid, fraction, which=which, ties="threshold")
            if len(shape) == 2:
                assert_as_reference(tied, valid, fraction, which=which, scope="sequence")


@pytest.mark.usefixtures("selection_backend")
def test_more_than_a_slice():
    tied = torch.randint(0, 9, (5, selection.CPU_SLICE // 4 + 1)).float()
    for which in ("top", "bottom"):
        assert_as_reference(tied, torch.rand(tied.shape) < 0.7, 0.2, which=which)


def test_ties_go_to_the_lowest_index():
    equal = torch.full((10,), 0.5)
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    assert top_entropy_mask(equal, mask, 0.5).nonzero().flatten().tolist() == [1, 2, 4, 5]
    assert top_entropy_mask(equal, mask, 0.5, which="bottom").sum() == 4
    assert torch.equal(top_entropy_mask(equal, mask, 0.5, ties="threshold"), mask)
    rows = top_entropy_mask(equal.expand(2, 10), mask.expand(2, 10), 0.5, scope="sequence")
    assert rows.nonzero().tolist() == [[row, i] for row in (0, 1) for i in (1, 2, 4, 5)]


def test_ties_across_slices_are_counted_on():
    entropy = torch.zeros(3 * selection.CPU_SLICE)
    entropy[-1] = 1.0
    keep = top_entropy_mask(entropy, None, 0.5)
    k = entropy.numel() // 2
    assert keep[: k - 1].all()
    assert keep[-1]
    assert keep.sum() == k


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_nan_is_selected_first(which, scope):
    entropy = torch.tensor([[1.0, NAN, 3.0, -NAN, INF, -INF, 0.0, 2.0, 5.0, 4.0]])
    keep = top_entropy_mask(entropy, None, 0.2, which=which, scope=scope)
    assert torch.equal(keep, entropy.isnan())
    keep = top_entropy_mask(entropy, None, 0.1, which=which, scope=scope, ties="threshold")
    assert torch.equal(keep, entropy.isnan())


def test_threshold_ties_are_the_indicator_of_the_paper():
    entropy = torch.randint(0, 9, (1000,)).float()
    mask = torch.rand(1000) < 0.5
    keep = top_entropy_mask(entropy, mask, 0.2, ties="threshold")
    assert torch.equal(keep, mask & (entropy >= entropy_threshold(entropy, mask, 0.2)))


def test_sequences_are_selected_apart():
    entropy = torch.cat([torch.rand(1, 50), 10 + torch.rand(1, 50)])
    assert top_entropy_mask(entropy).sum(1).tolist() == [0, 20]
    assert top_entropy_mask(entropy, scope="sequence").sum(1).tolist() == [10, 10]
    lengths = torch.tensor([[50], [0]])
    mask = torch.arange(50) < lengths
    assert top_entropy_mask(entropy, mask, scope="sequence").sum(1).tolist() == [10, 0]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_random_selects_k_tokens_evenly(scope):
    generator = torch.Generator().manual_seed(0)
    entropy, mask = torch.rand(4, 25), torch.ones(4, 25, dtype=torch.bool)
    mask[:, 20:] = False
    options = {"which": "random", "scope": scope, "generator": generator}
    draws = torch.stack([top_entropy_mask(entropy, mask, 0.25, **options) for _ in range(400)])
    assert not draws[:, ~mask].any()
    assert (draws.sum((1, 2)) == 20).all()
    if scope == "sequence":
        assert (draws.sum(2) == 5).all()
    # 400 draws at 1/4 deviate by 0.022; 4.6 of these in one of 80 tokens: 3 in 10,000.
    assert ((draws.float().mean(0)[mask] - 0.25).abs() < 0.1).all()


def test_random_follows_its_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return top_entropy_mask(torch.rand(500), None, which="random", generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert top_entropy_mask(torch.rand(500), which="random").sum() == 100


def test_layout_gradient_and_repetition():
    entropy = torch.randint(0, 9, (64, 50)).float().requires_grad_()
    mask = torch.rand(50, 64).T < 0.6
    for scope in ("batch", "sequence"):
        expected = top_entropy_mask(entropy.detach().contiguous(), mask.contiguous(), scope=scope)
        for layout in (entropy, entropy.T.contiguous().T, torch.stack([entropy] * 2, 2)[..., 0]):
            assert torch.equal(top_entropy_mask(layout, mask, scope=scope), expected)


@pytest.mark.parametrize("mask", [None, torch.arange(100) % 3 > 0], ids=["all", "masked"])
def test_opcheck(mask):
    values, threshold, quota = torch.randn(100), torch.tensor(0.5), torch.tensor(3)
    torch.library.opcheck(ops.select_largest, (values, mask, threshold, quota))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    def select(entropy, mask):
        return (
            top_entropy_mask(entropy, mask),
            top_entropy_mask(entropy, mask, which="bottom", ties="threshold"),
            top_entropy_mask(entropy, mask, scope="sequence"),
        )

    entropy = torch.randint(-2, 3, (8, 33)).float()
    entropy[0, :3] = torch.tensor([-0.0, NAN, INF])
    mask = torch.rand(8, 33) < 0.6
    compiled = torch.compile(select, fullgraph=True)(entropy, mask)
    torch.testing.assert_close(compiled, select(entropy, mask), rtol=0, atol=0)
    draw = torch.compile(top_entropy_mask, fullgraph=True, backend="aot_eager")
    assert draw(entropy, which="random").sum() == 53


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("ties", ["exact", "threshold"])
def test_does_not_wait_for_the_gpu(scope, ties):
    entropy, mask = torch.randint(0, 99, (64, 999)).float(), torch.rand(64, 999) < 0.7
    on_gpu = (entropy.cuda(), mask.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep = top_entropy_mask(*on_gpu, scope=scope, ties=ties)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keep.cpu(), top_entropy_mask(entropy, mask, scope=scope, ties=ties))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entropy": torch.rand(3).half()}, "entropy must be torch.float32; got torch.float16"),
        ({"mask": torch.ones(3)}, "mask must be a bool tensor; got torch.float32"),
        ({"fraction": 2.0}, r"fraction must be a number in \(0, 1\]; got 2.0"),
        ({"scope": "row"}, r"scope must be one of batch, sequence; got 'row'"),
        ({"which": "best"}, r"which must be one of .*random; got 'best'"),
        ({"ties": "all"}, r"ties must be one of exact, threshold; got 'all'"),
        ({"generator": torch.Generator()}, "generator is for which=\"random\"; got which='top'"),
        ({"scope": "sequence"}, r'scope="sequence" needs .*\[B, L\]; got \(3,\)'),
        (
            {
                "scope": "sequence",
                "entropy": torch.rand(3, 4),
                "group": ProcessGroup(0, 1),
            },
            'scope="sequence" takes no group.*; got a ProcessGroup',
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_entropy_mask(**({"entropy": torch.rand(3)} | arguments))
