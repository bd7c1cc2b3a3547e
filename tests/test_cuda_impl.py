"""impl="cuda": what runs csrc/cuda's kernels, and what falls to Triton's.

Tensors are fake ones on a GPU that need not be there, and the extension is one in Python.
"""

import re
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _extensions, _radix, backends, device
from tests import cuda_extension

pytest.importorskip("triton")

from entropy_kernels._triton.common import choice
from entropy_kernels.verification import first_use
from tests.gpu_options import CALLS, HEADS, MOST, B, L, T, V, bools, floats, make_head
from tests.host_waits import HostWaits, backward, fake_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def extension(monkeypatch):
    choice._tell.cache_clear()
    return cuda_extension.install(monkeypatch, cuda_extension.Extension())


@contextmanager
def on_gpu(arch="sm_90"):
    """A fake GPU, for which nothing waits; the launches of Triton's kernels."""
    with fake_gpu(arch) as launches, HostWaits() as waits:
        yield launches
    assert waits.found == {}


def step(head, **options):
    """Forward and backward of a head by impl="cuda"."""
    found = ek.linear_logprob_entropy(head, impl="cuda", max_active_rows=MOST, **options)
    backward(sum(x.sum() for x in found[:3]))


def tiles_of(extension, name):
    return {
        (tile.architecture, tile.rows, tile.columns, tile.depth)
        for tile in (call["tile"] for called, call in extension.calls if called == name)
    }


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_any_option_runs_on_csrc(name, extension):
    with on_gpu() as launches:
        step(make_head(B, L, **HEADS[name]()))
    assert extension.launched == ["forward", "merge", "dlogits"]
    assert not [kernel for kernel in launches if re.search("forward|target|merge|dlogits", kernel)]
    assert {call["stream"] for called, call in extension.calls if "stream" in call} == {
        cuda_extension.STREAM
    }
    forward = extension.calls[[x for x, _ in extension.calls].index("forward")][1]
    assert (forward["head"].rows, forward["head"].vocabulary) == (T, V)
    assert (forward["head"].softcap == 30.0) == (name == "softcap")
    assert forward["processors"] == 132


@pytest.mark.parametrize("name", ["keep_logits", "statistics", "a bound of no row"])
def test_a_call_of_any_option_runs_on_csrc(name, extension):
    options = CALLS[name]()
    with on_gpu():
        options.setdefault("max_active_rows", MOST)
        found = ek.linear_logprob_entropy(make_head(B, L), impl="cuda", **options)
        backward(found.entropy.sum())
    # Logits that are stored are read by a Triton kernel.
    wanted = {"forward", "merge"} | ({"dlogits"} if name != "keep_logits" else set())
    assert set(extension.launched) == wanted


@pytest.mark.parametrize(
    ("arch", "size", "forward", "dlogits"),
    [
        ("sm_80", 4096, (80, 128, 128, 64), (80, 128, 128, 64)),
        ("sm_89", 64, (80, 128, 128, 64), (80, 128, 128, 64)),
        ("sm_90", 1024, (90, 128, 128, 64), (90, 128, 128, 64)),
        ("sm_90", 1032, (90, 128, 256, 64), (90, 128, 256, 64)),
    ],
)
def test_the_tile_of_an_architecture_and_a_size(arch, size, forward, dlogits, extension):
    with on_gpu(arch):
        step(make_head(B, L, size=size))
    assert tiles_of(extension, "forward") == tiles_of(extension, "forward_splits") == {forward}
    assert tiles_of(extension, "dlogits") == {dlogits}


def half():
    head = make_head(B, L)
    return ek.Head(head.hidden.half(), head.weight.half(), head.target)


def apart():
    """A weight whose rows begin at odd multiples of 8 bytes."""
    head = make_head(B, L)
    wide = floats(V, 68, dtype=torch.bfloat16)
    return ek.Head(head.hidden, wide[:, :64].requires_grad_(), head.target)


# The architecture, the head, its options, and what is told of forward and of backward.
FALLS = {
    "fp16": ("sm_90", half, {}, "hidden must be torch.bfloat16; got torch.float16"),
    "odd D": (
        "sm_90",
        lambda: make_head(B, L, size=60),
        {},
        "the hidden size must be a multiple of 8; got 60",
    ),
    "rows apart": (
        "sm_90",
        apart,
        {},
        r"weight must have dense rows at multiples of 16 bytes; got strides \(68, 1\)",
    ),
    "no kernels for it": (
        "sm_120",
        lambda: make_head(B, L),
        {},
        "kernels of the head must be built for the GPU, sm_120; got sm_80, sm_90a, sm_100a",
    ),
}


@pytest.mark.parametrize("name", FALLS)
def test_what_csrc_lacks_falls_to_triton_and_is_told_once(name, extension):
    arch, make, options, why = FALLS[name]
    with on_gpu(arch) as launches, warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", category=RuntimeWarning)
        for _ in range(2):
            step(make(), **options)
    assert extension.launched == []
    assert [kernel for kernel in launches if "dlogits" in kernel]
    messages = [str(one.message) for one in told if one.category is RuntimeWarning]
    assert len(messages) == 2
    for op, message in zip(("forward", "dlogits"), messages, strict=True):
        assert re.fullmatch(f'impl="cuda" takes a Triton kernel for {op}: {why}', message)


def test_a_forward_of_statistics_that_csrc_lacks_falls_alone(extension):
    with on_gpu() as launches, warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", category=RuntimeWarning)
        for names in (("is_top1", "max_prob"), ("mean_logit",)):
            step(make_head(B, L), statistics=names)
    assert extension.launched == ["dlogits", "dlogits"]
    assert [kernel for kernel in launches if "forward" in kernel]
    (message,) = (str(one.message) for one in told if one.category is RuntimeWarning)
    assert message.endswith("varentropy, max_prob, sum_p2, sum_p2_logp; got others, too")


def test_a_backward_that_csrc_lacks_falls_alone(extension):
    with (
        on_gpu("sm_100"),
        pytest.warns(
            RuntimeWarning, match="for dlogits: .* must run on sm_80 or sm_90; got sm_100"
        ),
    ):
        step(make_head(B, L, size=4096))
    assert extension.launched == ["forward", "merge"]
    assert tiles_of(extension, "forward") == {(100, 256, 256, 64)}


def test_rows_above_a_threshold_are_stored_by_triton(extension):
    with (
        on_gpu("sm_90"),
        pytest.warns(RuntimeWarning, match="for forward: keep_logits_above .*; got a threshold"),
    ):
        step(make_head(B, L, size=4096), keep_logits_above=0.5)
    assert extension.launched == ["dlogits"]  # of the rows that were not stored


def test_a_kernel_that_is_known_to_be_wrong_is_passed_over(extension, monkeypatch):
    def refused(op, *_):
        return lambda tile: op == "forward" and tile.variant == "cutlass"

    monkeypatch.setattr(first_use, "refused", refused)
    with on_gpu(), pytest.warns(RuntimeWarning, match="for forward: .*--verify has found"):
        step(make_head(B, L))
    assert extension.launched == ["dlogits"]


def test_triton_and_auto_take_none_of_it(extension):
    with on_gpu() as launches:
        for impl in ("triton", "auto"):
            head = make_head(B, L)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                ek.linear_logprob_entropy(head, impl=impl)
                ek.top_entropy_mask(floats(B, L), impl=impl)
    assert extension.launched == []
    assert launches


def test_a_selection_is_one_launch_unless_it_is_long_or_shared(extension):
    with on_gpu() as launches:
        few, many = floats(1 << 17), floats((1 << 17) + 1)
        ek.top_entropy_mask(few, bools(1 << 17), impl="cuda")
        ek.top_entropy_mask(few, ties="threshold", impl="cuda")
        ek.entropy_threshold(few, impl="cuda")
        assert extension.launched == 3 * ["top"]
        chosen = [call["top"].selected is not None for _, call in extension.calls]
        assert chosen == [False, False, False]  # fake tensors have no address
        extension.calls.clear()
        ek.top_entropy_mask(many, impl="cuda")
        passes = 3 * ["radix_histogram", "radix_pick"]
        assert extension.launched == [*passes, "select_largest"]
        extension.calls.clear()
        _radix.kth_largest([(few, None), (few, None)], 0.2, None, "cuda")
        assert set(extension.launched) == {"radix_histogram", "radix_pick"}
        for mode in ("exact", "sketch"):
            extension.calls.clear()
            stream = ek.StreamingThreshold(mode=mode, impl="cuda")
            stream.update(few)
            stream.value()
            assert extension.launched == (["top"] if mode == "exact" else ["radix_histogram"])
    assert not launches


def test_a_loss_takes_every_part_of_csrc(extension):
    with on_gpu():
        backend = ek.Backend("cuda", max_active_rows=MOST)
        given = make_head(B, L), floats(B, L), floats(B), bools(B, L)
        backward(ek.high_entropy_policy_loss(*given, backend=backend)[0])
    assert extension.launched == ["forward", "merge", "top", "ratio_loss", "dlogits"]


def test_every_launch_is_on_the_gpu_of_its_tensors(monkeypatch):
    current = []

    @contextmanager
    def on(where):
        current.append(where)
        yield
        current.pop()

    def run(name, given):
        if name == "forward_splits":
            return -(-given["vocabulary"] // given["tile"].columns)
        assert current[-1:] == [GPU], name
        return None

    extension = cuda_extension.install(monkeypatch, cuda_extension.Extension(run))
    with on_gpu(), mock.patch.object(device, "on", on):
        backend = ek.Backend("cuda", max_active_rows=MOST)
        given = make_head(B, L), floats(B, L), floats(B), bools(B, L)
        backward(ek.high_entropy_policy_loss(*given, backend=backend)[0])
        ek.top_entropy_mask(floats((1 << 17) + 1), impl="cuda")
    assert {*extension.launched} == cuda_extension.calls().keys() - {"forward_splits"}


@pytest.mark.parametrize(
    ("where", "change", "why"),
    [
        ("cpu", {}, "CUDA kernels need tensors on a GPU; got cpu"),
        ("cuda", {"hip": "6.4"}, "CUDA kernels need a GPU of NVIDIA; got gfx942"),
        ("cuda", {"missing": "entropy_kernels._cuda is not built: no nvcc"}, "not built: no nvcc"),
        ("cuda", {"driver": 12080}, "the driver's is 12.8; install a driver of CUDA 13"),
        ("cuda", {"driver": 0}, "this machine has no driver for it"),
        ("cuda", {"triton": "Triton does not load: gone"}, "Triton does not load: gone"),
    ],
)
def test_what_cannot_run_at_all_is_refused_with_its_reason(
    where, change, why, extension, monkeypatch
):
    if "hip" in change:
        monkeypatch.setattr(torch.version, "hip", change["hip"])
    if "missing" in change:
        monkeypatch.setattr(_extensions, "load", lambda name: (None, change["missing"]))
    if "driver" in change:
        monkeypatch.setattr(extension, "driver_version", lambda: change["driver"])
    if "triton" in change:
        monkeypatch.setattr(backends, "why_no_triton", lambda: change["triton"])
    with on_gpu("gfx942" if "hip" in change else "sm_90"):
        hidden, entropy = torch.zeros(T, 64, device=where), torch.zeros(T, device=where)
        head = ek.Head(hidden, torch.zeros(V, 64, device=where), entropy.long())
        with pytest.raises(ValueError, match=f'impl="cuda" cannot run: .*{re.escape(why)}'):
            ek.linear_logprob_entropy(head, impl="cuda")
        if "triton" in change:
            # The selection and the loss need none.
            ek.top_entropy_mask(entropy, impl="cuda")
            return
        with pytest.raises(ValueError, match=f'impl="cuda" cannot run: .*{re.escape(why)}'):
            ek.top_entropy_mask(entropy, impl="cuda")
    assert extension.launched == []


def test_a_loss_in_fp64_is_refused(extension):
    with on_gpu():
        logprob = floats(B, L, dtype=torch.float64)
        with pytest.raises(ValueError, match=r'impl="cuda" needs fp32 .*; got torch.float64'):
            ek.ratio_loss(logprob, None, floats(B), bools(B, L), impl="cuda")
