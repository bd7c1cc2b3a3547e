"""impl="auto" takes the Triton kernels that prove themselves at their first use, and no others.

The interpreter stands for the GPU. T tokens, V vocabulary.
"""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import entropy_kernels as ek
from entropy_kernels import backends
from tests.marks import nan_is_meant

pytest.importorskip("triton")

from entropy_kernels._triton.head_forward import launch
from entropy_kernels.verification import checks, first_use
from tests.first_use_cases import CPU, T, V, call, make_head, taken

pytestmark = [
    nan_is_meant,
    pytest.mark.usefixtures("gpu_alone"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="interprets"),
]


@pytest.fixture
def checked(monkeypatch):
    """The questions that are checked, by texts; each is right unless `wrong` names it."""
    asked, wrong = [], {}

    def check(question, where, sizes=None, forward=None):
        asked.append(question.text)
        return next((why for name, why in wrong.items() if name in question.text), None)

    monkeypatch.setattr(checks, "check", check)
    return asked, wrong


def test_a_call_asks_for_what_it_runs(checked):
    asked, _ = checked
    assert taken(make_head(torch.bfloat16, gradient=False)) == "triton"
    assert [text.split()[:3] for text in asked] == [["forward", "bfloat16", "pointer"]]
    head = make_head(torch.bfloat16, bias=torch.zeros(V).bfloat16(), temperature=0.5, softcap=9.0)
    assert taken(head, statistics_wanted=6) == "triton"
    assert asked[1].endswith(" bias temperature softcap statistics ragged")
    assert asked[2].endswith(" bias temperature softcap ragged")
    assert taken(make_head(), stored=True) == "triton"
    assert asked[3].startswith("forward float32 cublas")
    assert asked[3].endswith(" stored")
    assert asked[4].startswith("dlogits float32 pointer")
    assert asked[4].endswith(" stored ragged")
    assert taken(make_head(), keep_logits=True) == "triton"
    assert [text.partition(" keep_logits")[2] for text in asked[5:]] == [" ragged", ""]
    assert asked[6] == "dlogits float32 keep_logits"
    ops = itertools.product(("support", "entropy_from_logits"), ("bfloat16", "float32"))
    for op, dtype in [("selection", "float32"), ("ratio_loss", "float32"), *ops]:
        assert backends.resolve(op, "auto", CPU, getattr(torch, dtype)) == "triton"
        assert asked[-1] == f"{op} {dtype}"
    count = len(asked)
    assert taken(make_head(), keep_logits=True) == taken(make_head(), stored=True) == "triton"
    assert len(asked) == count


def test_sizes_that_are_no_multiples_of_16_are_questions_of_their_own(checked):
    asked, wrong = checked
    assert taken(make_head(gradient=False)) == "triton"
    h, w = torch.randn(T, 24), torch.randn(201, 24)
    odd = ek.Head(h, w, torch.zeros(T, dtype=torch.int64))
    wrong |= {"pointer 32 64 32 4 1 2 128 0 odd V ragged odd D": "wrong"}
    with pytest.warns(RuntimeWarning, match="odd V ragged odd D is not taken"):
        assert taken(odd) == "triton"
    assert [text.partition(" 128 0 ")[2] for text in asked[:2]] == ["ragged", "odd V ragged odd D"]
    # Numbers of tokens are none.
    count = len(asked)
    more = dataclasses.replace(odd, hidden=h[:39], target=odd.target[:39])
    assert taken(more) == "triton"
    assert len(asked) == count
    ((text, _),) = [x for x in first_use.known(CPU).items() if not x[1].right]
    options = call(odd).options
    assert text.endswith("odd V ragged odd D")
    assert first_use.refused("forward", CPU, torch.float32, 24, options) is not None


def test_every_public_function_asks(checked):
    asked, _ = checked
    head, row = make_head(), torch.rand(T)
    loss, _ = ek.high_entropy_policy_loss(head, -row, row - 0.5, row > 0.2)
    loss.backward()
    assert {text.split()[0] for text in asked} == {"forward", "dlogits", "selection", "ratio_loss"}
    asked.clear()
    ek.linear_logprob_entropy(head, support=ek.Support.of([[y, V - 1 - y] for y in head.target]))
    assert asked == ["support float32"]
    asked.clear()
    ek.linear_logprob_entropy(make_head(torch.float16), token_ids=torch.arange(3))
    assert [text.split()[:2] for text in asked] == 2 * [
        ["forward", "float16"],
        ["dlogits", "float16"],
    ]
    # Its backward gives a bias to kernels that its forward has none for.
    assert [" bias" in text for text in asked] == [False, False, True, True]


@pytest.mark.parametrize("others", [True, False], ids=["next tile", "torch"])
def test_a_wrong_kernel_is_told_once_and_not_taken(checked, monkeypatch, others):
    asked, wrong = checked
    wrong |= {"forward float32 pointer": "wrong: by much"}
    if not others:
        wrong |= {f"forward float32 {name}": "wrong too" for name in ("tma", "cublas")}
    head = make_head()
    backend = "triton" if others else "torch"
    with pytest.warns(RuntimeWarning) as told:
        assert [taken(head), taken(make_head())] == [backend, backend]
    texts = [str(x.message) for x in told]
    assert sum("pointer" in x and "wrong: by much" in x for x in texts) == 1
    assert sum("torch path" in x and "no forward kernel is right" in x for x in texts) == 1 - others
    assert sum("forward float32 pointer" in text for text in asked) == 1

    def refuse(work):
        raise AssertionError("a tile that is known to be wrong was launched")

    monkeypatch.setattr(launch, "from_pointers", refuse)
    for impl in ("auto", "triton") if others else ("auto",):
        got = ek.linear_logprob_entropy(head, impl=impl)
        torch.testing.assert_close(got[:3], ek.linear_logprob_entropy(head, impl="torch")[:3])


CALL = """
import torch
import entropy_kernels as ek
from entropy_kernels import _native
from entropy_kernels.verification import checks, first_use
_native.why_missing = lambda name: "left out"
first_use.asks = lambda where: True
checks.check = lambda *work: "wrong"
x = torch.zeros(2, 24)
ek.linear_logprob_entropy(ek.Head(x, x, torch.zeros(2).long()))  # the caller
"""


def test_a_warning_names_the_line_of_the_caller(tmp_path):
    """In a process without the checks of shapes, whose frames come between."""
    script = tmp_path / "script.py"
    script.write_text(CALL)
    root = os.path.dirname(os.path.dirname(ek.__file__))
    environment = os.environ | {"PYTHONPATH": root, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    told = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(told) > 1
    assert all(line.startswith(f"{script}:10:") for line in told), told


def test_an_answer_of_another_process_decides_too(checked):
    asked, wrong = checked
    wrong |= {"dlogits": "wrong"}
    for number in (5, 5):
        first_use.forget()
        with pytest.warns(RuntimeWarning) as told:
            assert taken(make_head()) == "torch"
        assert "no backward kernel is right" in str(told[-1].message)
        backends._warn_of_the_torch_path.cache_clear()
        # The forward and both tiles of the backward.
        assert len(asked) == 3, number
    assert taken(make_head(gradient=False)) == "triton"


def test_off_checks_nothing_and_believes_the_record(checked, monkeypatch):
    asked, _ = checked
    monkeypatch.setenv("EK_VERIFY", "off")
    with pytest.warns(RuntimeWarning, match="EK_VERIFY=off, and no check"):
        assert taken(make_head()) == "torch"
    monkeypatch.setenv("EK_VERIFY", "on")
    assert taken(make_head()) == "triton"
    count = len(asked)
    first_use.forget()
    monkeypatch.setenv("EK_VERIFY", "off")
    assert taken(make_head()) == "triton"
    assert len(asked) == count > 0


def test_force_checks_once_per_process(checked, monkeypatch):
    asked, _ = checked
    assert taken(make_head()) == "triton"
    first_use.forget()
    monkeypatch.setenv("EK_VERIFY", "force")
    for _ in range(2):
        assert taken(make_head()) == "triton"
        assert len(asked) == 4
    first_use.forget()
    assert taken(make_head()) == "triton"
    assert len(asked) == 6


def test_another_mode_is_refused(monkeypatch):
    monkeypatch.setenv("EK_VERIFY", "yes")
    with pytest.raises(ValueError, match="EK_VERIFY must be one of on, off, force; got 'yes'"):
        taken(make_head())


def test_without_memory_nothing_is_recorded(checked, monkeypatch):
    asked, _ = checked
    check = checks.check

    def full(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(checks, "check", full)
    with pytest.warns(RuntimeWarning, match="no memory left"):
        assert taken(make_head()) == "torch"
    assert first_use.known(CPU) == {}
    monkeypatch.setattr(checks, "check", check)
    assert taken(make_head()) == "triton"
    assert asked


def test_under_capture_torch_is_taken_for_now(checked, monkeypatch):
    asked, _ = checked
    monkeypatch.setattr(first_use, "_capturing", lambda where: True)
    with pytest.warns(RuntimeWarning, match="captured") as told:
        assert taken(make_head()) == taken(make_head()) == "torch"
    assert sum("torch is captured" in str(x.message) for x in told) == 1
    assert not asked
    monkeypatch.setattr(first_use, "_capturing", lambda where: False)
    assert taken(make_head()) == "triton"
    monkeypatch.setattr(first_use, "_capturing", lambda where: True)
    assert taken(make_head()) == "triton"


def test_fake_tensors_are_not_checked(checked):
    asked, _ = checked
    with FakeTensorMode():
        assert backends.resolve("selection", "auto", CPU) == "torch"
        with pytest.warns(RuntimeWarning, match="without memory"):
            assert taken(make_head()) == "torch"
    assert not asked
    assert first_use.known(CPU) == {}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("others", [0, 1])
def test_ranks_of_a_vocab_group_agree_once(checked, monkeypatch, others):
    reduced, group = [], object()

    def all_reduce(x, op, where):
        assert (op, where) == (torch.distributed.ReduceOp.MIN, group)
        reduced.append(int(x))
        x.mul_(others)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for _ in range(2):
        found = first_use.right("linear_logprob_entropy", CPU, *call(make_head()), group)
        assert found.right == bool(others)
        assert others or "another rank" in found.reason
    assert reduced == [1]
    assert first_use.right("linear_logprob_entropy", CPU, *call(make_head())).right


def test_rows_are_stored_only_by_a_kernel_that_is_not_wrong(checked, monkeypatch):
    _, wrong = checked
    launched, forward = [], launch.forward

    def watched(head, **options):
        launched.append(options["store_above"] is not None)
        return forward(head, **options)

    monkeypatch.setattr(launch, "forward", watched)
    wrong |= {"cublas": "wrong"}
    with pytest.warns(RuntimeWarning, match="stored is not taken"):
        ek.linear_logprob_entropy(make_head(), keep_logits_above=0.1)
    wrong.clear()
    ek.linear_logprob_entropy(make_head(torch.float16), keep_logits_above=0.1)
    assert launched == [False, True]


@pytest.mark.usefixtures("unchecked_shapes")
def test_torch_compile_asks_once_while_it_traces(checked):
    asked, _ = checked

    def run(hidden, head):
        outputs = ek.linear_logprob_entropy(dataclasses.replace(head, hidden=hidden))
        return outputs.logprob + outputs.entropy

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    head = make_head()
    got = compiled(head.hidden, head)
    count = len(asked)
    assert count == 2
    torch.testing.assert_close(got, run(head.hidden, head))
    more = dataclasses.replace(head, hidden=head.hidden[:30], target=head.target[:30])
    torch.testing.assert_close(compiled(more.hidden, more), run(more.hidden, more))
    assert len(asked) == count


def test_an_interrupt_waits_for_the_case_and_leaves_no_mark(checked, monkeypatch):
    ended = []

    def check(*args, **options):
        signal.raise_signal(signal.SIGINT)
        threading.Event().wait(0.2)
        ended.append(True)

    monkeypatch.setattr(checks, "check", check)
    with pytest.raises(KeyboardInterrupt):
        taken(make_head())
    assert ended
    assert not list(first_use.record(CPU).folder.glob("*.started"))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    first_use.forget()
    assert first_use.known(CPU) == {}


def test_a_tile_that_ended_two_processes_is_told_in_each_later_one(checked, monkeypatch):
    asked, check = checked[0], checks.check
    folder = first_use.record(CPU).folder  # not asked in a thread, which would wait for the lock

    def end(*args, **options):  # leaves the mark of a process that ended
        [mark] = (x for x in folder.glob("*.started") if "dead" not in x.name)
        mark.with_name(mark.name.replace(".started", "dead.started")).write_text(mark.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "check", end)
    for _ in range(2):
        first_use.forget()
        with pytest.raises(KeyboardInterrupt):
            taken(make_head(gradient=False))
    monkeypatch.setattr(checks, "check", check)
    for _ in range(2):
        first_use.forget()
        with pytest.warns(RuntimeWarning, match="pointer .* ended twice .* EK_VERIFY=force"):
            assert taken(make_head(gradient=False)) == "triton"
    assert [text.split()[2] for text in asked] == ["tma"]
    monkeypatch.setenv("EK_VERIFY", "force")
    first_use.forget()
    assert taken(make_head(gradient=False)) == "triton"
    assert [text.split()[2] for text in asked] == ["tma", "pointer"]
    assert not list(folder.glob("*.started"))
