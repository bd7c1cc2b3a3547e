"""StreamingThreshold: the threshold of many micro-batches is that of their concatenation."""

import io
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_kernels import StreamingThreshold, entropy_threshold

INF = float("inf")
NAN = float("nan")
MODES = ["exact", "sketch"]
SMALLEST_NORMAL = 2.0**-126
ENTROPIES = st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 12, width=32)


def accumulate(parts, **options):
    threshold = StreamingThreshold(**options)
    for entropy, mask in parts:
        threshold.update(entropy, mask)
    return threshold


def step_of_batches(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        entropy = torch.empty(3, 101).exponential_(generator=generator)
        yield entropy, torch.rand(3, 101, generator=generator) < 0.7


def concatenated(parts):
    entropies, masks = zip(*parts, strict=True)
    return torch.cat([e.flatten() for e in entropies]), torch.cat([m.flatten() for m in masks])


@pytest.mark.parametrize("fraction", [0.2, 0.55, 1.0, 1e-9])
def test_exact_equals_the_whole(fraction):
    parts = list(step_of_batches())
    threshold = accumulate(parts, fraction=fraction)
    entropy, mask = concatenated(parts)
    assert torch.equal(threshold.value(), entropy_threshold(entropy, mask, fraction))
    assert threshold.count == mask.sum()


@settings(deadline=None, max_examples=40)
@given(
    entropies=st.lists(ENTROPIES, min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    order=st.randoms(use_true_random=False),
    mode=st.sampled_from(MODES),
)
def test_order_and_split_do_not_matter(entropies, cuts, order, mode):
    whole = torch.tensor(entropies, dtype=torch.float32)
    expected = accumulate([(whole, None)], mode=mode).value()
    edges = [0, *sorted(min(cut, len(entropies)) for cut in cuts), len(entropies)]
    parts = [(whole[a:b], None) for a, b in pairwise(edges)]
    order.shuffle(parts)
    assert torch.equal(accumulate(parts, mode=mode).value(), expected)


@settings(deadline=None, max_examples=50)
@given(
    entropies=st.lists(ENTROPIES | st.floats(0, width=32), min_size=1, max_size=40),
    fraction=st.sampled_from([0.2, 0.55, 1.0]),
)
def test_sketch_is_within_its_bound(entropies, fraction):
    entropy = torch.tensor(entropies, dtype=torch.float32)
    sketch = accumulate([(entropy, None)], fraction=fraction, mode="sketch")
    exact = entropy_threshold(entropy, None, fraction)
    value = sketch.value()
    assert value <= exact
    if SMALLEST_NORMAL <= exact < INF:
        assert value.double() >= exact.double() * (1 - 2**-10)
    assert sketch.mask(entropy).sum() >= (entropy >= exact).sum()


@pytest.mark.parametrize(
    ("entropy", "value"),
    [
        ([0.0, -0.0, 0.0], 0.0),
        ([INF, 1.0], INF),
        ([-INF, -INF], -INF),
        ([NAN, 1.0], NAN),
        ([-1.0009766, -2.0], -1.0009766),
    ],
)
def test_sketch_of_special_values(entropy, value):
    sketch = accumulate([(torch.tensor(entropy), None)], mode="sketch")
    # Below zero the lower edge of a bin is its largest magnitude.
    bound = 2**-10 if -INF < value < 0 else 0
    torch.testing.assert_close(
        sketch.value(), torch.tensor(value), rtol=bound, atol=0, equal_nan=True
    )
    assert sketch.mask(torch.tensor(entropy))[0]


@pytest.mark.parametrize("mode", MODES)
def test_without_a_token(mode):
    threshold = StreamingThreshold(mode=mode)
    assert threshold.value() == INF
    assert threshold.count == threshold.selected_count() == threshold.denominator("all") == 0
    threshold.update(torch.empty(0, 5))
    threshold.update(torch.rand(3), torch.zeros(3, dtype=torch.bool))
    assert threshold.value() == INF
    assert not threshold.mask(torch.rand(3)).any()


@pytest.mark.parametrize("mode", MODES)
def test_mask_is_the_indicator_of_the_paper(mode):
    entropy = torch.randint(0, 9, (40, 25)).float()
    entropy[0, 0] = NAN
    valid = torch.rand(40, 25) < 0.7
    valid[0, 0] = True
    threshold = accumulate(zip(entropy, valid, strict=True), mode=mode)
    keep = threshold.mask(entropy, valid)
    assert torch.equal(keep, valid & ((entropy >= threshold.value()) | entropy.isnan()))
    assert keep[0, 0]
    # Small integers are edges of the sketch's bins.
    assert threshold.value() == entropy_threshold(entropy, valid)


@settings(deadline=None, max_examples=50)
@given(
    entropies=st.lists(ENTROPIES | st.floats(width=32), max_size=40),
    fraction=st.sampled_from([0.2, 0.55, 1.0]),
    mode=st.sampled_from(MODES),
)
def test_selected_count_is_that_of_the_masks(entropies, fraction, mode):
    entropy = torch.tensor(entropies, dtype=torch.float32)
    valid = torch.arange(len(entropies)) % 3 != 1
    parts = list(zip(entropy.split(7), valid.split(7), strict=True))
    threshold = accumulate(parts, fraction=fraction, mode=mode)
    kept = sum(threshold.mask(*part).sum() for part in parts)
    assert threshold.selected_count() == threshold.denominator() == kept
    assert threshold.denominator("all") == valid.sum()
    threshold.update(torch.ones(2))
    assert threshold.denominator("all") == valid.sum() + 2
    assert threshold.denominator().dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_value_is_kept_until_the_next_update(mode):
    threshold = StreamingThreshold(1.0, mode=mode)
    entropy = torch.tensor([2.0])
    threshold.update(entropy)
    entropy.zero_()
    assert threshold.value() == 2.0
    assert threshold.value() is threshold.value()
    threshold.update(torch.tensor([1.0]))
    assert threshold.value() == 1.0
    threshold.reset()
    assert threshold.value() == INF


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("updates", [0, 2])
def test_state_dict_goes_on_exactly(mode, updates):
    parts = list(step_of_batches(4))
    before = accumulate(parts[:updates], mode=mode)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = accumulate(parts, mode=mode)
    after.value()
    after.load_state_dict(torch.load(file, weights_only=True))
    assert after.count == before.count
    assert torch.equal(after.value(), before.value())
    for entropy, mask in parts[updates:]:
        after.update(entropy, mask)
    assert torch.equal(after.value(), accumulate(parts, mode=mode).value())


@pytest.mark.parametrize("mode", MODES)
def test_state_without_a_token_fits_any_device(mode):
    threshold = StreamingThreshold(mode=mode)
    threshold.load_state_dict(StreamingThreshold(mode=mode).state_dict())
    threshold.update(torch.rand(3, device="meta"))
    assert threshold.count.device.type == "meta"


def loaded(state, **options):
    threshold = StreamingThreshold(**options)
    threshold.load_state_dict(state)
    return threshold


@pytest.mark.parametrize("mode", MODES)
def test_the_device_is_known_without_a_token(mode):
    """What a rank without one gives to the collectives: a CPU tensor hangs or fails with NCCL."""

    def learned(call):
        threshold = StreamingThreshold(mode=mode)
        call(threshold)
        threshold.reset()
        return threshold

    given = StreamingThreshold(mode=mode, device="meta")
    found = {
        "given": given,
        "given, reset": StreamingThreshold(mode=mode, device=torch.device("meta")),
        "updated": learned(lambda t: t.update(torch.empty(3, device="meta"))),
        "masked": learned(lambda t: t.mask(torch.empty(3, device="meta"))),
        "loaded": loaded(given.state_dict(), mode=mode),
        "given, loaded": loaded(
            StreamingThreshold(mode=mode).state_dict(), mode=mode, device="meta"
        ),
    }
    found["given, reset"].reset()
    for name, threshold in found.items():
        state = threshold.state_dict()["counts" if mode == "sketch" else "entropies"]
        for x in (threshold.value(), threshold.count, state):
            assert x.device.type == "meta", name
    assert loaded(found["updated"].state_dict(), mode=mode).value().device.type == "meta"


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_without_a_token_gives_its_device_to_the_collectives(mode, monkeypatch):
    devices = []
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda x, group: devices.append(x.device.type)
    )
    threshold = StreamingThreshold(mode=mode, group=dist.ProcessGroup(0, 1), device="meta")
    threshold.value()
    threshold.load_state_dict(StreamingThreshold(mode=mode).state_dict())
    threshold.reset()
    threshold.mask(torch.empty(3, device="meta"))
    assert devices == ["meta"] * (2 if mode == "sketch" else 6)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_goes_to_the_device_that_was_given(mode):
    state = accumulate([(torch.zeros(3), None)], mode=mode).state_dict()
    assert loaded(state, mode=mode).count == 3
    assert loaded(state, mode=mode, device="meta").value().device.type == "meta"
    with pytest.raises(ValueError, match="entropy must be on meta, as device= says; got cpu"):
        StreamingThreshold(mode=mode, device="meta").update(torch.rand(3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_nan_is_kept_whether_or_not_it_is_the_threshold(mode, count):
    """Two of 10 tokens are wanted: 3 NaN are the threshold, 1 is not. All NaN are selected."""
    entropy = torch.arange(10.0)
    entropy[1 : 1 + count] = NAN
    threshold = accumulate([(part, None) for part in entropy.split(3)], mode=mode)
    assert threshold.value().isnan() == (count == 3)
    joined = torch.cat([threshold.mask(part) for part in entropy.split(3)])
    assert joined[entropy.isnan()].all()
    assert joined.sum() == max(count, 2)


def test_exact_mode_keeps_four_bytes_a_valid_token():
    threshold = StreamingThreshold()
    threshold.update(torch.rand(1000), torch.arange(1000) < 300)
    assert threshold.state_dict()["entropies"].nbytes == 1200


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments():
    with pytest.raises(ValueError, match=r"fraction must be a number in \(0, 1\]; got 0.0"):
        StreamingThreshold(0.0)
    with pytest.raises(ValueError, match=r"mode must be one of exact, sketch; got 'fast'"):
        StreamingThreshold(mode="fast")
    threshold = accumulate([(torch.rand(3), None)])
    with pytest.raises(ValueError, match="count must be one of selected, all; got 'kept'"):
        threshold.denominator("kept")
    for call in (threshold.update, threshold.mask):
        with pytest.raises(ValueError, match=r"entropy must be torch.float32; got torch.float64"):
            call(torch.rand(3).double())
        with pytest.raises(ValueError, match=r"mask must be a bool tensor; got torch.int64"):
            call(torch.rand(3), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="entropy must be on cpu, as in earlier updates; got meta"):
        threshold.update(torch.rand(3, device="meta"))


def test_state_of_another_kind_is_refused():
    state = StreamingThreshold(0.2).state_dict()
    with pytest.raises(ValueError, match=r"state's fraction is 0.2, this object's is 0.5"):
        StreamingThreshold(0.5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state's mode is 'exact', this object's is 'sketch'"):
        StreamingThreshold(0.2, mode="sketch").load_state_dict(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", MODES)
def test_does_not_wait_for_the_gpu(mode):
    parts = list(step_of_batches())
    on_gpu = [(entropy.cuda(), mask.cuda()) for entropy, mask in parts]
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = accumulate(on_gpu, mode=mode).value()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(value.cpu(), accumulate(parts, mode=mode).value())
