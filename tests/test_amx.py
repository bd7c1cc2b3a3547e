"""bf16 heads on the tiles of AMX. The same source runs on the processor's tiles if it has them, and
on a model of them. test_native_linear_logprob_entropy.py tests its values too."""

import functools
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import __main__ as main
from entropy_kernels import _native
from tests.head_cases import assert_as_reference
from tests.test_native_linear_logprob_entropy import run

WHY = _native.why_missing("cpu")
pytestmark = pytest.mark.skipif(WHY is not None, reason=WHY or "built")
LISTED = _native.cpu().instruction_sets(models=True) if WHY is None else []
# On another processor than x86 there is nothing to test.
TILED = [isa for isa in LISTED if isa in ("amx", "amx_model")]
DIMS = [1, 2, 3, 31, 32, 33, 63, 64, 65, 515]
ROWS = [1, 15, 16, 17, 31, 33, 95, 97]
TOKENS = [1, 15, 17, 63, 65]
# Each D with two V and two T, and each of those several times.
SHAPES = [
    (TOKENS[(i + j) % 5], dim, ROWS[(3 * i + 5 * j) % 8])
    for i, dim in enumerate(DIMS)
    for j in (0, 1)
]


def odd_head(tokens, dim, vocabulary):
    """A bf16 head; its weight lies in rows of a wider matrix, from its memory's start to end."""
    stride = dim + (3 if dim % 2 else 2)
    hidden = torch.randn(tokens, dim).bfloat16()
    memory = torch.randn((vocabulary - 1) * stride + dim).bfloat16() / dim**0.5
    weight = memory.as_strided((vocabulary, dim), (stride, 1))
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def test_shapes_hold_every_size():
    for axis, sizes in enumerate((TOKENS, DIMS, ROWS)):
        assert {shape[axis] for shape in SHAPES} == {*sizes}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", TILED)
def test_tails_of_every_tile(isa, shape):
    """Values lie within the bounds of all instruction sets. Under `make sanitize` this also shows
    that no memory beyond the weight's is read."""
    h, w, y = odd_head(*shape)
    grads = [torch.randn(shape[0]) for _ in range(3)]
    got = run(isa, h, w, y, grads)
    assert_as_reference(got, (h, w, y, None), grads, operands=torch.bfloat16)


@pytest.mark.parametrize("isa", TILED)
def test_the_product_that_is_checked_at_first_use(isa):
    assert _native.cpu().agrees(isa)


@pytest.mark.parametrize("isa", TILED)
def test_kept_logits_and_runs_give_the_same_bits(isa):
    h, w, y = odd_head(130, 65, 1021)
    grads = [torch.randn(130), torch.randn(130) * (torch.rand(130) < 0.5), None]
    first = run(isa, h, w, y, grads)
    for keep_logits in (False, True):
        again = run(isa, h, w, y, grads, keep_logits=keep_logits)
        assert all(map(torch.equal, again[:5], first[:5]))


@pytest.mark.parametrize("isa", TILED)
def test_threads_move_the_last_bits_only(isa):
    """Threads add up forward's sums and the gradient of hidden, but not the gradient of weight."""
    h, w, y = odd_head(150, 48, 3001)
    grads = [torch.randn(150), torch.randn(150), None]
    head = ek.Head(h, w, y, temperature=None)
    before = torch.get_num_threads()
    found, gradients = {}, {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = _native.forward(head, keep_logits=False, isa=isa)
            gradients[threads] = _native.backward(
                tuple(grads), head, found[1], (True, True, False), isa=isa
            )
    finally:
        torch.set_num_threads(before)
    dh, dw, _ = gradients[1]
    for threads in (2, 3):
        torch.testing.assert_close(found[threads][:5], found[1][:5], rtol=1e-6, atol=1e-6)
        assert torch.equal(gradients[threads][1], dw)
        atol = 1e-6 * float(dh.abs().max())
        torch.testing.assert_close(gradients[threads][0], dh, rtol=2**-7, atol=atol)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("isa", TILED)
def test_a_nan_stays_in_its_row(isa, where):
    """Zeros fill partial tiles up, so a NaN of one operand meets no other row there."""
    h, w, y = odd_head(33, 33, 97)
    grads = [torch.ones(33), torch.ones(33), None]
    clean = run(isa, h, w, y, grads)
    (h if where == "hidden" else w)[-1, -1] = torch.nan
    logprob, entropy, logsumexp, dh, dw = run(isa, h, w, y, grads)
    if where == "hidden":
        for got, want in zip((logprob, entropy, logsumexp, dh), clean, strict=False):
            assert got[-1].isnan().all()
            assert torch.equal(got[:-1], (clean[3] if got is dh else want)[:-1])
        assert dw.isnan().all()
    else:
        assert all(x.isnan().all() for x in (logprob, entropy, logsumexp, dh, dw))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("isa", TILED)
def test_a_signal_handler_may_use_the_tiles(isa, direction):
    """Signal handlers run between blocks, every 0.2 seconds, on a thread whose registers are
    configured."""
    small, few = odd_head(5, 8, 11), [torch.ones(5), None, None]
    grads, before, calls = [torch.ones(200), None, None], torch.get_num_threads(), []

    def compute():
        start = time.monotonic()
        if direction == "forward":
            got = _native.forward(head, keep_logits=False, isa=isa)[:3]
        else:
            needs = True, True, False
            got = _native.backward(tuple(grads), head, found, needs, isa=isa)[:2]
        return time.monotonic() - start, got

    handler = signal.signal(signal.SIGALRM, lambda *_: calls.append(run(isa, *small, few)))
    torch.set_num_threads(1)
    try:
        elapsed, vocabulary = 0.0, 2000
        while elapsed < 0.6:
            vocabulary *= 2
            head = ek.Head(*odd_head(200, 64, vocabulary), temperature=None)
            found = _native.forward(head, keep_logits=False, isa=isa)
            elapsed, want = compute()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        _, got = compute()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        torch.set_num_threads(before)
    assert len(calls) == 1
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("isa", TILED)
def test_ctrl_c_between_blocks(isa, direction, monkeypatch):
    """EK_CPU_ISA may name the model."""
    script = textwrap.dedent(
        f"""
        import torch, entropy_kernels as ek
        from entropy_kernels import _native
        assert _native.instruction_set(torch.bfloat16) == "{isa}"
        torch.set_num_threads(2)
        h = torch.randn(512, 256).bfloat16()
        w = torch.randn(40000, 256, requires_grad=True, dtype=torch.bfloat16)
        y = torch.zeros(512, dtype=torch.int64)
        if "{direction}" == "backward":
            loss = ek.linear_logprob_entropy(ek.Head(h[:5], w, y[:5]), impl="cpu").entropy.sum()
        print("ready", flush=True)
        while True:
            if "{direction}" == "forward":
                ek.linear_logprob_entropy(ek.Head(h, w, y), impl="cpu")
            else:
                loss.backward(retain_graph=True)
        """
    )
    monkeypatch.setenv("EK_CPU_ISA", isa)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    threading.Event().wait(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo names features")
def test_amx_is_listed_where_it_is_there_and_nothing_speaks_against_it():
    flags = Path("/proc/cpuinfo").read_text().split()
    why = _native.cpu().why_no_amx()
    assert (why is not None) == ({"amx_bf16", "amx_tile"} <= {*flags})
    assert ("amx" in LISTED) == (why == "")


@pytest.mark.skipif(not TILED, reason="the extension has no kernels for tiles")
def test_the_model_is_not_chosen_unless_it_is_named(monkeypatch):
    assert "amx_model" not in _native.cpu().instruction_sets()
    monkeypatch.setattr(
        _native, "instruction_set", functools.cache(_native.instruction_set.__wrapped__)
    )
    monkeypatch.delenv("EK_CPU_ISA", raising=False)
    assert "amx_model" not in {_native.instruction_set(d) for d in _native.DTYPES}
    # Sets without products of these dtypes are not said to run them.
    assert _native.instruction_set(torch.float32) != "amx"


@pytest.mark.skipif(not TILED, reason="the extension has no kernels for tiles")
def test_the_extension_holds_the_instructions():
    """The source that runs on the model is also compiled to tile instructions."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump on PATH reads the extension")
    command = [objdump, "-d", "--no-show-raw-insn", _native.cpu().__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert f"\t{instruction}" in code
    # 2 x 2 tiles of the result. The operands are in AT&T's order: b, a, c.
    dots = re.findall(r"\ttdpbf16ps (\S+)", code)
    products = ["%tmm6,%tmm4,%tmm0", "%tmm7,%tmm4,%tmm1", "%tmm6,%tmm5,%tmm2", "%tmm7,%tmm5,%tmm3"]
    assert {*dots} == {*products}
    assert len(dots) == code.count("\ttileloadd")


def processor_with_amx(monkeypatch, why, taken):
    """The report's lines on a machine whose extension says `why`."""
    listed = ["amx"] * (why == "") + ["avx512_bf16", "avx512", "avx2", "portable"]
    module = SimpleNamespace(instruction_sets=lambda: listed, why_no_amx=lambda: why)
    monkeypatch.setattr(_native, "cpu", lambda: module)
    monkeypatch.setattr(
        _native, "instruction_set", lambda dtype: taken if dtype == torch.bfloat16 else "avx512"
    )
    return main._instruction_sets()


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("its products differ from those of AVX-512", "its products differ from those of AVX-512"),
        ("the operating system refuses it", "the operating system refuses it"),
        ("", "it was measured to be slower"),
    ],
)
def test_the_report_says_what_is_lost_without_amx(monkeypatch, why, said):
    sets, amx = processor_with_amx(monkeypatch, why, "avx512")
    assert sets.startswith("instruction sets: avx512 for fp32, avx512 for bf16, avx512 for fp16")
    assert said in amx
    assert "torch.mm in bf16 may use it and be faster, but rounds logits" in amx
    assert "no impl takes it" in amx


@pytest.mark.parametrize(("why", "taken"), [("", "amx"), (None, "avx512_bf16")])
def test_nothing_is_lost_where_amx_runs_or_is_not_there(monkeypatch, why, taken):
    (line,) = processor_with_amx(monkeypatch, why, taken)
    assert f"{taken} for bf16" in line


def test_without_the_extension_nothing_is_said(monkeypatch):
    monkeypatch.setattr(_native, "cpu", lambda: None)
    assert main._instruction_sets() == []
