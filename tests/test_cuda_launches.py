"""What the launches of impl="cuda" give csrc/cuda, and what they refuse before any launch.

T tokens, C compact rows, D hidden, V vocabulary, S vocabulary splits.
"""

import pytest
import torch

from entropy_kernels._cuda_kernels import head, merge, ratio_loss, selection
from entropy_kernels._rows import ForwardRows
from tests import cuda_extension

T, D, V, S = 5, 16, 300, 2
BLOCK = head.Block(80, 128, 256, 64)
WRONG = {
    "dtype": lambda x: x.half() if x.dtype != torch.float16 else x.float(),
    "shape": lambda x: torch.cat([x, x]) if x.ndim else x[None],
    "strides": lambda x: x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2],
    "device": lambda x: x.to("meta"),
}


@pytest.fixture
def extension(monkeypatch):
    return cuda_extension.install(monkeypatch, cuda_extension.Extension())


def bf16(*shape):
    return torch.randn(shape).bfloat16()


def product(**other):
    return head.Product(bf16(T, D), bf16(V, D), bf16(V), torch.rand(T), 5.0)._replace(**other)


def rows(statistics=False, **other):
    partials = torch.zeros(7 if statistics else 4, S, T)
    zeros, number = torch.zeros(T), torch.full((1,), T).int()
    made = head.Rows(zeros.long(), zeros.int(), number, partials, zeros, None)
    return made._replace(**other)


def gradients(**other):
    fields, target, dz = torch.zeros(6, T), torch.zeros(T).long(), bf16(T, 104)
    bias = torch.zeros(1, 104)
    made = head.Gradients(
        fields, target, torch.zeros(1).int(), torch.full((1,), T).int(), dz, bias, 200, V, True
    )
    return made._replace(**other)


def merged(**other):
    named = {
        "partials": torch.zeros(4, S, T),
        "target_logit_T": torch.zeros(T),
        "slot_T": torch.zeros(T, dtype=torch.int32),
        "target_T": torch.zeros(T).long(),
        "temperature_T": torch.ones(T),
        "rows": ForwardRows(*(torch.zeros(T) for _ in range(6))),
        "statistics": None,
    }
    return merge.merge(**named | other, vocabulary=V, ignore_index=-100)


def loss(**other):
    shape = 3, 7
    named = {
        "logprob_BL": torch.zeros(shape),
        "old_logprob_BL": torch.zeros(shape),
        "advantage_BL": torch.zeros(shape),
        "selected_BL": torch.ones(shape, dtype=torch.bool),
        "weight_B": torch.ones(3),
    }
    return ratio_loss.ratio_loss(*(named | other).values(), 0.2, 0.28, None, 20.0)


def given(struct, *names):
    return {name: getattr(struct, name) for name in names}


def pointers(**tensors):
    return {name: None if x is None else x.data_ptr() for name, x in tensors.items()}


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_forward(extension, statistics, keep):
    one, logits = product(), torch.zeros(T, V) if keep else None
    into = rows(statistics, logits=logits)
    head.forward(BLOCK, one, into)
    assert extension.launched == ["forward"]
    _, call = extension.calls[-1]
    assert given(call["tile"], *BLOCK._fields) == BLOCK._asdict()
    assert call["processors"] == head.device.processors(torch.device("cpu"))
    assert given(call["head"], "hidden", "weight", "bias", "temperature") == pointers(
        hidden=one.hidden, weight=one.weight, bias=one.bias, temperature=one.temperature
    )
    numbers = {"stride_hidden": D, "stride_weight": D, "stride_temperature": 1, "softcap": 5.0}
    numbers |= {"rows": T, "depth": D, "vocabulary": V}
    assert given(call["head"], *numbers) == numbers
    wanted = into._asdict()
    wanted["index"] = wanted.pop("row")
    assert given(call["forward"], *wanted) == pointers(**wanted)
    assert given(call["forward"], "statistics", "splits") == {"statistics": statistics, "splits": S}


def test_a_forward_without_options(extension):
    shared = torch.tensor(0.7).expand(T)
    head.forward(BLOCK, head.Product(bf16(T, D), bf16(V, 2 * D)[:, :D]), rows())
    plain = extension.calls[-1][1]["head"]
    nothing = {"bias": None, "temperature": None, "stride_temperature": 0, "softcap": 0.0}
    assert given(plain, *nothing) == nothing
    assert plain.stride_weight == 2 * D
    head.forward(BLOCK, product(temperature=shared), rows())
    assert extension.calls[-1][1]["head"].stride_temperature == 0
    assert extension.calls[-1][1]["head"].temperature == shared.data_ptr()
    for softcap, divides in ((1e-50, 1e-30), (1e38, 1e30)):
        head.forward(BLOCK, product(softcap=softcap), rows())
        assert extension.calls[-1][1]["head"].softcap == pytest.approx(divides, rel=1e-6, abs=0)


def test_programs_beyond_all_tiles_where_none_persists(extension, monkeypatch):
    monkeypatch.setenv("EK_PERSISTENT", "off")
    head.forward(BLOCK, product(), rows())
    assert extension.calls[-1][1]["processors"] == 2 * 1 * 2


def test_a_gradient_of_logits(extension):
    one, into = product(temperature=None), gradients()
    head.dlogits(BLOCK, one, into)
    assert extension.launched == ["dlogits"]
    _, call = extension.calls[-1]
    tensors = {name: x for name, x in into._asdict().items() if isinstance(x, torch.Tensor)}
    assert given(call["dlogits"], *tensors) == pointers(**tensors)
    numbers = {"stride_dz": 104, "start": 200, "stop": V, "has_entropy": True}
    assert given(call["dlogits"], *numbers) == numbers
    head.dlogits(BLOCK, one, gradients(first=None, bias_partials=None, has_entropy=False))
    nothing = {"first": None, "bias_partials": None, "has_entropy": False}
    assert given(extension.calls[-1][1]["dlogits"], *nothing) == nothing


@pytest.mark.parametrize("with_statistics", [False, True])
def test_a_merge(extension, with_statistics):
    found = ForwardRows(*(torch.zeros(T) for _ in range(6)))
    statistics = torch.zeros(4, T) if with_statistics else None
    partials = torch.zeros(7 if with_statistics else 4, S, T)
    merged(rows=found, statistics=statistics, partials=partials, temperature_T=None)
    assert extension.launched == ["merge"]
    call = extension.calls[-1][1]["merge"]
    wanted = dict(zip(found._fields[:5], found, strict=False))
    wanted |= {"partials": partials, "statistics": statistics, "temperature": None}
    assert given(call, *wanted) == pointers(**wanted)
    numbers = {"rows": T, "vocabulary": V, "splits": S, "ignore_index": -100}
    assert given(call, *numbers) == numbers


def test_a_ratio_loss(extension):
    transposed = torch.randn(7, 3).T
    found = loss(logprob_BL=transposed)
    assert extension.launched == ["ratio_loss"]
    call = extension.calls[-1][1]["loss"]
    names = "loss", "grad", "sums", "counts"
    assert given(call, *names) == pointers(**dict(zip(names, found, strict=True)))
    assert found[1].is_contiguous()
    assert (call.tokens, call.length, call.dual_clip, call.log_ratio_bound) == (21, 7, 0, 20)
    assert (call.clip_low, call.clip_high) == pytest.approx((0.2, 0.28))


@pytest.mark.parametrize("mask", [None, torch.arange(9) % 3 > 0])
def test_a_selection(extension, mask):
    values, zero = torch.randn(9), torch.zeros((), dtype=torch.int64)
    counts = selection.radix_histogram(values, mask, zero, 10, 11, 11)
    picked = selection.radix_pick(counts, counts, zero, None, 0.2, 21)
    selected = selection.select_largest(values, mask, picked[3], picked[1])
    threshold, quota, equal, chosen = selection.top(values, mask, 0.25, True)
    assert not selection.top(values, mask, 0.25, False)[3].numel()
    assert extension.launched == ["radix_histogram", "radix_pick", "select_largest", "top", "top"]
    histogram, pick, largest, top, unmasked = (call for _, call in extension.calls)
    for call in (histogram, largest, top):
        assert given(call["values"], "value", "mask") == pointers(value=values, mask=mask)
        assert call["values"].count == 9
    digit = {"shift": 10, "bits": 11, "prefix_bits": 11, "prefix": zero.data_ptr()}
    assert {name: histogram[name] for name in digit} == digit
    assert histogram["counts"] == pick["counts"] == pick["local"] == counts.data_ptr()
    assert not counts.any()
    assert (pick["share"], pick["shift"], pick["bits"], pick["remaining"]) == (0.2, 21, 11, 0)
    results = ("new_prefix", "new_remaining", "equal", "value")
    assert [pick[name] for name in results] == [x.data_ptr() for x in picked]
    assert largest["threshold"] == picked[3].data_ptr()
    assert (largest["quota"], largest["selected"]) == (picked[1].data_ptr(), selected.data_ptr())
    wanted = pointers(threshold=threshold, quota=quota, equal=equal, selected=chosen)
    wanted |= {"rows": None, "number": None}
    assert given(top["top"], *wanted) == wanted
    assert (top["share"], unmasked["top"].selected) == (0.25, None)


def test_nothing_is_launched_on_no_values(extension):
    none, zero = torch.empty(0), torch.zeros((), dtype=torch.int64)
    assert not selection.radix_histogram(none, None, zero, 21, 11, 0).any()
    assert selection.select_largest(none, None, torch.tensor(0.0), zero).shape == (0,)
    assert extension.launched == []
    selection.top(none, None, 0.2, True)
    assert extension.launched == ["top"]  # it writes +inf and zeros


CALLS = {
    **{
        f"forward {name}": (
            lambda x, name=name: head.forward(BLOCK, product(), rows(**{name: x})),
            getattr(rows(logits=torch.zeros(T, V)), name),
        )
        for name in head.Rows._fields
    },
    **{
        f"forward {name}": (
            lambda x, name=name: head.forward(BLOCK, product(**{name: x}), rows()),
            getattr(product(), name),
        )
        for name in ("bias", "temperature")
    },
    **{
        f"dlogits {name}": (
            lambda x, name=name: head.dlogits(
                BLOCK, product(temperature=None), gradients(**{name: x})
            ),
            getattr(gradients(), name),
        )
        for name in ("fields", "target", "first", "number", "bias_partials")
    },
    **{
        f"merge {name.removesuffix('_T')}": (
            lambda x, name=name: merged(**{name: x}),
            torch.zeros(T, dtype=dtype),
        )
        for name, dtype in {
            "target_logit_T": torch.float32,
            "slot_T": torch.int32,
            "target_T": torch.int64,
            "temperature_T": torch.float32,
        }.items()
    },
    "select_largest threshold": (
        lambda x: selection.select_largest(torch.zeros(3), None, x, torch.tensor(1)),
        torch.tensor(0.5),
    ),
    "select_largest quota": (
        lambda x: selection.select_largest(torch.zeros(3), None, torch.tensor(0.5), x),
        torch.tensor(1),
    ),
    "top mask": (
        lambda x: selection.top(torch.zeros(3), x, 0.2, True),
        torch.ones(3, dtype=torch.bool),
    ),
    "radix_pick local": (
        lambda x: selection.radix_pick(torch.zeros(4).long(), x, torch.tensor(0), None, 0.2, 21),
        torch.zeros(4).long(),
    ),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name, (_, right) in CALLS.items()
        for how in WRONG
        if how != "strides" or right.numel() > 1
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_before_any_launch(extension, name, how):
    run, right = CALLS[name]
    wrong = WRONG[how](right)
    call, tensor = name.replace("row", "index").split()
    with pytest.raises(ValueError, match=f"{tensor} of {call} must be .*; got "):
        run(wrong)
    assert extension.launched == []


@pytest.mark.parametrize("how", ["dtype", "shape", "device"])
@pytest.mark.parametrize("name", ["old_logprob_BL", "advantage_BL", "selected_BL", "weight_B"])
def test_a_ratio_loss_of_tensors_that_do_not_fit_is_refused(extension, name, how):
    right = {"selected_BL": torch.ones(3, 7, dtype=torch.bool), "weight_B": torch.ones(3)}
    wrong = WRONG[how](right.get(name, torch.zeros(3, 7)))
    called = name.rsplit("_", 1)[0]
    with pytest.raises(ValueError, match=f"{called} of ratio_loss must be .*; got "):
        loss(**{name: wrong})
    assert extension.launched == []


def shifted(*shape):
    """bf16 that begins 2 bytes after a multiple of 16."""
    buffer = bf16(torch.Size(shape).numel() + 8)
    assert buffer.data_ptr() % 16 == 0
    return buffer[1:][: torch.Size(shape).numel()].view(shape)


MATRICES = {
    "fp16": ({"hidden": bf16(T, D).half()}, "hidden of forward must be torch.bfloat16 .*; got"),
    "fp32 weight": ({"weight": torch.zeros(V, D)}, "weight of forward must be torch.bfloat16"),
    "another device": (
        {"weight": bf16(V, D).to("meta")},
        "weight of forward .* on cpu; got .*meta",
    ),
    "another D": ({"weight": bf16(V, 2 * D)}, r"weight of forward must be .*\[300, 16\].*; got"),
    "odd D": (
        {"hidden": bf16(T, 12), "weight": bf16(V, 12)},
        r"forward: hidden must have .* multiples of 16 bytes; got strides \(12, 1\)",
    ),
    "columns apart": (
        {"weight": bf16(V, 2 * D)[:, ::2]},
        r"forward: weight must have dense rows .*; got strides \(32, 2\)",
    ),
    "one row for all": (
        {"hidden": bf16(1, D).expand(T, D)},
        r"forward: hidden must have dense rows .*; got strides \(0, 1\)",
    ),
    "an odd address": (
        {"weight": shifted(V, D)},
        "forward: weight must begin at a multiple of 16 bytes; got 0x",
    ),
    "no row": (
        {"hidden": bf16(0, D)},
        "forward takes 1 to 2147483135 rows and words; got 0 and 300",
    ),
    "no word": ({"weight": bf16(0, D)}, "got 5 and 0"),
    "too many words": ({"weight": bf16(1, D).expand(2147483136, D)}, "got 5 and 2147483136"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_that_no_kernel_reads_are_refused(extension, name):
    other, message = MATRICES[name]
    with pytest.raises(ValueError, match=message):
        head.forward(BLOCK, product(**other), rows())
    assert extension.launched == []


@pytest.mark.parametrize(("start", "stop"), [(-8, 90), (200, 200), (200, V + 1), (0, 105)])
def test_columns_that_dz_has_no_room_for_are_refused(extension, start, stop):
    with pytest.raises(ValueError, match=rf"columns of dlogits .*; got {start} to {stop}"):
        head.dlogits(BLOCK, product(temperature=None), gradients(start=start, stop=stop))
    assert extension.launched == []


@pytest.mark.parametrize("dz", [bf16(T, 100), shifted(T, 104)])
def test_a_gradient_that_is_not_aligned_is_refused(extension, dz):
    bias = torch.zeros(1, dz.shape[1])
    with pytest.raises(ValueError, match="dlogits: dz must "):
        head.dlogits(BLOCK, product(), gradients(dz=dz, bias_partials=bias, stop=290))
    assert extension.launched == []
