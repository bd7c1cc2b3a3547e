"""The check refuses kernels that are broken on purpose, says why, and "auto" computes without them.

All run as if their programs ran at the same time.
"""

import functools
from unittest import mock

import pytest
import torch

from tests.marks import nan_is_meant, sampled

pytest.importorskip("triton")

import triton
import triton.language as tl

import entropy_kernels as ek
from entropy_kernels import backends, reference
from entropy_kernels.verification import first_use, machine
from entropy_kernels.verification.record import Record
from entropy_kernels.verification.truth import run
from tests import mutants
from tests.concurrent_programs import at_once
from tests.head_cases import assert_as_reference, logprob_entropy, make
from tests.mutant_cases import MUTANTS
from tests.mutants import CPU

QUESTIONS = list(dict.fromkeys(mutant.question for mutant in MUTANTS))
# The others take as long each.
FAST = ("forward float32 cublas", "selection", "ratio_loss")
pytestmark = [
    sampled(0.2),
    nan_is_meant,
    pytest.mark.skipif(torch.cuda.is_available(), reason="interprets"),
]


def named(name):
    (found,) = [mutant for mutant in MUTANTS if mutant.name == name]
    return found


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(x, id=x.text, marks=[] if x.text.startswith(FAST) else pytest.mark.slow)
        for x in QUESTIONS
    ],
)
def test_right_kernels_pass(question):
    with at_once():
        assert mutants.refusal(question) is None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_refused(mutant):
    assert mutants.reason(mutant) is not None


@triton.jit
def store_twice_kernel(out_ptr):
    for i in range(2):
        tl.store(out_ptr + tl.program_id(0), 2 * tl.program_id(0) + i, mask=True)
        tl.store(out_ptr + 2, 2 * tl.program_id(0) + i, mask=True)


def test_stores_of_a_program_keep_their_order():
    out = torch.zeros(3, dtype=torch.int32)
    with at_once():
        store_twice_kernel[(2,)](out)
    assert out.tolist() == [1, 3, 1]


def test_an_edit_without_its_text_is_an_error():
    mutant = MUTANTS[0]._replace(old="no such line")
    with pytest.raises(ValueError, match="must occur once"), mutants.broken(mutant):
        pass


def test_the_kernels_are_whole_again():
    for mutant in MUTANTS:
        with mutants.broken(mutant):
            pass
    test_right_kernels_pass(named("one split dropped").question)


def wrong_answers():
    return {
        text: answer.reason
        for text, answer in Record(machine.machine(CPU)).read().items()
        if not answer.right
    }


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("a tail column let in", "triton"),
        ("one split dropped", "other"),
        ("dz rounded early", "other"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*takes the torch path:RuntimeWarning")
def test_auto_computes_a_head_without_them(name, taken, gpu):
    """By the next tile that is right, or by another backend. The record has the reason."""
    h, w, y = make("peaked", (40, 24, 201), torch.float32)
    head = functools.partial(logprob_entropy, impl="auto")
    grads = list(torch.randn(3, 40))
    with mutants.broken(named(name)), mock.patch.object(first_use, "_tell") as tell:
        got = run(head, (h, w, y, None), grads)
        flat = ek.Head(h.requires_grad_(), w.requires_grad_(), y).flat()
        assert (backends.resolve_head("auto", flat) == "triton") == (taken == "triton")
    assert_as_reference(got, (h.detach(), w.detach(), y, None), grads)
    reasons = wrong_answers()
    assert reasons
    told = [call.args[0] for call in tell.call_args_list]
    for text, reason in reasons.items():
        assert "rows: AssertionError: " in reason
        assert sum(text in words and reason in words for words in told) == 1


@pytest.mark.parametrize("name", ["ties of a threshold counted twice", "dual clip missing"])
def test_auto_selects_and_loses_without_them(name, gpu):
    entropy = (3 * torch.empty(2100).exponential_()).floor()
    (logprob, old), advantage = -torch.rand(2, 4, 30), torch.randn(4, 30)
    mask = torch.ones(4, 30, dtype=torch.bool)
    want = ek.ratio_loss(logprob, old, advantage, mask, impl="torch")[0]
    mutant = named(name)
    with mutants.broken(mutant), mock.patch.object(first_use, "_tell") as tell:
        selected = ek.top_entropy_mask(entropy, fraction=0.2)
        loss, _ = ek.ratio_loss(logprob, old, advantage, mask)
    assert torch.equal(selected, reference.top_entropy_mask(entropy, None, 0.2))
    torch.testing.assert_close(loss, want)
    ((text, reason),) = wrong_answers().items()
    assert text.startswith(mutant.op)
    assert reason in tell.call_args.args[0]
