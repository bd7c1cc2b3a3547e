"""The compiled head: every instruction set, threads, Ctrl-C. Values at large: see
test_linear_logprob_entropy.py, which runs on the best instruction set of the machine."""

import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _native, backends
from entropy_kernels.testing import peaked_head
from tests.head_cases import DTYPES, assert_as_reference
from tests.marks import sampled

WHY = _native.why_missing("cpu")
pytestmark = [sampled(0.2), pytest.mark.skipif(WHY is not None, reason=WHY or "built")]
INSTRUCTION_SETS = _native.cpu().instruction_sets(models=True) if WHY is None else []
# Whose products of bf16 heads take dz as bf16.
OF_BF16 = {"amx", "amx_model", "avx512_bf16", "neon_bf16"}
CPUINFO = Path("/proc/cpuinfo")


def run(isa, h, w, y, grads, **options):
    """Outputs and gradients of one instruction set."""
    bias, temperature = options.get("bias"), options.get("temperature")
    head = ek.Head(h, w, y, bias, temperature, options.get("softcap"))
    found = _native.forward(head, keep_logits=options.get("keep_logits", False), isa=isa)
    needs = (True, True, bias is not None)
    gradients = _native.backward(tuple(grads), head, found, needs, isa=isa)
    return [*found[:3], *(x for x in gradients if x is not None)]


@pytest.mark.skipif(not CPUINFO.exists(), reason=f"no {CPUINFO} says what the machine has")
def test_every_set_that_the_machine_has_is_listed():
    assert INSTRUCTION_SETS[-1] == "portable"
    flags = {"avx512_bf16": "avx512_bf16", "avx2": "avx2", "neon": "asimd", "neon_bf16": "bf16"}
    has = CPUINFO.read_text().split()
    for isa, flag in flags.items():
        assert (isa in INSTRUCTION_SETS) == (flag in has)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(67, 40, 2055), (130, 37, 1021), (600, 33, 99), (5, 65, 385)], ids=str
)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_instruction_sets_agree_with_the_reference(isa, shape, dtype):
    """Odd D (half a unit of bf16), tails of every tile, several row chunks, all options at once."""
    h, w, y = peaked_head(*shape, dtype=dtype)
    T, V = shape[0], shape[2]
    grads = [torch.randn(T) * (torch.rand(T) < 0.9) for _ in range(3)]
    options = {"bias": torch.randn(V), "temperature": torch.rand(T) + 0.5, "softcap": 12.0}
    got = run(isa, h, w, y, grads, **options)
    operands = torch.bfloat16 if dtype == torch.bfloat16 and isa in OF_BF16 else torch.float32
    inputs = h, w, y, options.pop("bias")
    assert_as_reference(got, inputs, grads, operands=operands, **options)


class Timed(ModuleType):
    """An extension whose sets of instructions take the given times."""

    def __init__(self, **seconds):
        super().__init__("timed")
        self.times = seconds

    def instruction_sets(self, models=False):
        return list(self.times)

    def seconds(self, isa, dtype):
        return self.times[isa] if dtype == 1 else pytest.fail("fp32 runs alike on them")


@pytest.fixture
def anew():
    _native.instruction_set.cache_clear()
    yield
    _native.instruction_set.cache_clear()


@pytest.mark.parametrize(
    ("pairs", "best"),
    [(0.5, "avx512_bf16"), (1.0, "avx512_bf16"), (1.2, "avx512_bf16"), (1.7, "avx512")],
)
def test_bf16_runs_on_the_faster_instruction(monkeypatch, anew, pairs, best):
    """Half the time of fp32 on AMD, 1.7 times on Intel; nearly equal is decided once for all."""
    module = Timed(avx512_bf16=pairs, avx512=1.0, avx2=2.0, portable=4.0)
    monkeypatch.setattr(_native, "loaded", lambda: module)
    monkeypatch.delenv("EK_CPU_ISA", raising=False)
    assert _native.instruction_set(torch.bfloat16) == best
    assert _native.instruction_set(torch.float32) == "avx512_bf16"
    assert _native.instruction_set(torch.float16) == "avx512_bf16"


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_environment_overrules_what_is_faster(monkeypatch, anew, isa):
    h, w, y = peaked_head(20, 33, 100, dtype=torch.bfloat16)
    grads = [torch.randn(20), None, None]
    want = run(isa, h, w, y, grads)
    monkeypatch.setenv("EK_CPU_ISA", isa)
    assert all(_native.instruction_set(dtype) == isa for dtype in DTYPES)
    assert all(map(torch.equal, run(None, h, w, y, grads), want))


def test_an_unknown_set_in_the_environment_is_refused(monkeypatch, anew):
    monkeypatch.setenv("EK_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"EK_CPU_ISA must be one of .*portable here; got 'sse9'"):
        ek.linear_logprob_entropy(ek.Head(*peaked_head(3, 4, 5)), impl="cpu")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_seconds_are_those_of_a_product(isa):
    """The lanes' operations of one such product, at a rate no core has and at a slow one's."""
    flops = 4 * 2 * 24 * 64 * 64
    for dtype in range(3):
        assert flops / 1e13 < _native.cpu().seconds(isa, dtype) < flops / 1e7


def test_the_caches_are_those_that_the_system_reports():
    caches = _native.caches()
    assert 2**16 <= caches["l2"] <= caches["last"] < 2**33
    sizes = [
        p.read_text().strip() for p in Path("/sys/devices/system/cpu").glob("cpu0/cache/*/size")
    ]
    if sizes:
        assert {f"{caches['l2'] >> 10}K", f"{caches['last'] >> 10}K"} <= set(sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_every_size_give_the_same(monkeypatch, dtype):
    """Caches of a small core, of this one and of a large server. The tokens of forward are
    independent, and a row of the weight's gradient has one writer; the hidden states' is a sum."""
    h, w, y = peaked_head(600, 40, 1301, dtype=dtype)
    grads = [torch.randn(600), torch.randn(600), None]
    results = []
    for caches in (
        {"l2": 2**17, "last": 2**17},
        {"l2": 2**19, "last": 2**23},
        {"l2": 2**24, "last": 2**30},
    ):
        monkeypatch.setattr(_native, "caches", lambda caches=caches: caches)
        results.append(run(None, h, w, y, grads))
    for got in results[1:]:
        for i in (0, 1, 2, 4):
            assert torch.equal(got[i], results[0][i])
        rounding = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got[3], results[0][3], rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("active", [1.0, 0.3], ids=["every row", "some rows"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_kept_logits_give_the_same_gradients(isa, active):
    h, w, y = peaked_head(150, 33, 1021)
    rows = torch.rand(150) < active
    y[::7] = -100
    grads = [torch.randn(150) * rows, torch.randn(150) * rows, None]
    kept, recomputed = (
        run(isa, h, w, y, grads, keep_logits=keep, softcap=9.0) for keep in (True, False)
    )
    assert all(map(torch.equal, kept, recomputed))


def test_the_thread_count_moves_the_last_bits_only():
    """Each thread sums its own part of the vocabulary, and parts are merged in fp64 (statistics)
    or fp32 (gradient of the hidden states). A row of the weight's gradient has one writer."""
    h, w, y = peaked_head(150, 48, 5003)
    grads = [torch.randn(150), torch.randn(150), None]
    head = ek.Head(h, w, y, temperature=None)
    before = torch.get_num_threads()
    found, gradients = {}, {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads], again = (_native.forward(head, keep_logits=False) for _ in "ab")
            same = zip(found[threads][:6], again[:6], strict=True)
            assert all(torch.equal(a, b) for a, b in same)
            needs = (True, True, False)
            gradients[threads], again = (
                _native.backward(tuple(grads), head, found[1], needs) for _ in "ab"
            )
            assert all(torch.equal(gradients[threads][i], again[i]) for i in (0, 1))
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        torch.testing.assert_close(found[threads][:5], found[1][:5], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients[threads][0], gradients[1][0], rtol=1e-5, atol=1e-6)
        assert torch.equal(gradients[threads][1], gradients[1][1])


def test_several_python_threads_at_once():
    h, w, y = peaked_head(100, 32, 3001)
    want = ek.linear_logprob_entropy(ek.Head(h, w, y), impl="cpu")
    wrong = []

    def work():
        for _ in range(5):
            got = ek.linear_logprob_entropy(ek.Head(h, w, y), impl="cpu")
            if not all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True)):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ctrl_c_between_blocks(direction, one_thread):
    """The GIL is free while the kernel runs, and pending signals are looked for.

    Time is the processor's for this process, whatever else the machine does, and is compared with
    that of a call of an eighth.
    """
    w, y = torch.randn(40000, 256, requires_grad=True), torch.zeros(8192, dtype=torch.int64)
    h = torch.randn(8192, 256)
    began = 0.0

    def head(count):
        return ek.linear_logprob_entropy(ek.Head(h[:count], w, y[:count]), impl="cpu").entropy.sum()

    def seconds(count):
        nonlocal began
        loss = head(count) if direction == "backward" else None
        began = time.process_time()
        loss.backward() if direction == "backward" else head(count)
        return time.process_time() - began

    eighth = min(seconds(1024) for _ in range(3))
    began, sent = float("inf"), []

    def interrupt():
        while time.process_time() - began < eighth / 2:
            time.sleep(0.001)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()

    def call():
        seconds(8192)
        thread.join()  # which has it come at the latest
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        call()
    caught = time.process_time()
    thread.join()
    assert sent[0] - began < 3 * eighth
    assert caught - sent[0] < 3 * eighth


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_unknown_instruction_set_is_refused():
    h, w, y = peaked_head(3, 8, 11)
    with pytest.raises(ValueError, match="no instruction set sse9"):
        run("sse9", h, w, y, [torch.ones(3), None, None])


def test_impl_cpu_needs_the_extension(monkeypatch, unchecked_shapes):
    h, w, y = peaked_head(3, 8, 11)
    monkeypatch.setattr(_native, "why_missing", lambda name: f"{name} is not built")
    with pytest.raises(ValueError, match='impl="cpu" cannot run: cpu is not built'):
        ek.linear_logprob_entropy(ek.Head(h, w, y), impl="cpu")
    backends._warn_of_the_torch_path.cache_clear()  # another test of this process may have warned
    with pytest.warns(RuntimeWarning, match="takes the torch path, which is slower"):
        ek.linear_logprob_entropy(ek.Head(h, w, y))
    ek.linear_logprob_entropy(ek.Head(h, w, y))
