"""impl="auto" takes the Triton kernels that prove themselves at their first use, and no others.

The interpreter stands for the GPU. T tokens, D hidden, V vocabulary.
"""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import backends
from tests.marks import nan_is_meant

pytest.importorskip("triton")

from entropy_kernels.verification import checks, first_use

CPU = torch.device("cpu")
T, D, V = 40, 24, 201
pytestmark = [nan_is_meant, pytest.mark.skipif(torch.cuda.is_available(), reason="interprets")]


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A machine whose CPU is asked about as a GPU is, with a record of its own."""
    monkeypatch.setenv("EK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("EK_VERIFY", raising=False)
    monkeypatch.setattr(first_use, "asks", lambda where: where.type == "cpu")
    first_use.forget()
    yield
    first_use.forget()


@pytest.fixture
def checked(monkeypatch):
    """The questions that are checked, by texts; each is right unless `wrong` names it."""
    asked, wrong = [], {}

    def check(question, where, sizes=None, forward=None):
        asked.append(question.text)
        return next((why for name, why in wrong.items() if name in question.text), None)

    monkeypatch.setattr(checks, "check", check)
    return asked, wrong


def make_head(dtype=torch.float32, gradient=True, **options):
    torch.manual_seed(3)
    h, w = torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)
    return ek.Head(
        h.requires_grad_(gradient), w.requires_grad_(gradient), torch.randint(V, (T,)), **options
    )


def taken(head, **options):
    """The backend that "auto" takes."""
    return backends.resolve_head("auto", head.flat(), **options)


def test_right_kernels_are_taken_and_a_second_process_reads_the_record(monkeypatch):
    head = make_head()
    got = ek.linear_logprob_entropy(head)
    want = ek.linear_logprob_entropy(head, impl="reference")
    assert taken(head) == "triton"
    torch.testing.assert_close(got[:3], want[:3])
    first_use.forget()
    monkeypatch.setattr(checks, "check", None)
    assert taken(head) == "triton"
