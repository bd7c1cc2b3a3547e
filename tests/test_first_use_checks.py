"""The check of a first use finds what is wrong, and leaves its caller alone."""

import subprocess
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import entropy_kernels as ek
from entropy_kernels import backends
from tests.marks import nan_is_meant

pytest.importorskip("triton")

from entropy_kernels._triton.head_forward import launch
from entropy_kernels._triton.pair_products import launch as pair_products
from entropy_kernels._triton.sampling import launch as entropies
from entropy_kernels.verification import checks, first_use
from entropy_kernels.verification.question import Question
from tests.first_use_cases import CPU, call, make_head, taken

pytestmark = [
    nan_is_meant,
    pytest.mark.usefixtures("gpu_alone"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="interprets"),
]


def test_right_kernels_are_taken_and_a_second_process_reads_the_record(monkeypatch):
    head = make_head()
    got = ek.linear_logprob_entropy(head)
    want = ek.linear_logprob_entropy(head, impl="reference")
    assert taken(head) == "triton"
    torch.testing.assert_close(got[:3], want[:3])
    first_use.forget()
    monkeypatch.setattr(checks, "check", None)
    assert taken(head) == "triton"


def test_a_kernel_that_raises_is_refused(monkeypatch):
    def raise_(*work):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(launch, "from_pointers", raise_)
    head = make_head(gradient=False)
    with pytest.warns(RuntimeWarning, match="out of resource: shared memory"):
        got = ek.linear_logprob_entropy(head)
    torch.testing.assert_close(got[:3], ek.linear_logprob_entropy(head, impl="torch")[:3])
    answers = first_use.known(CPU)
    assert {text.split()[2]: answer.right for text, answer in answers.items()} == {
        "pointer": False,
        "tma": True,
    }


def test_a_mistake_in_a_variable_is_no_kernel_s(monkeypatch):
    monkeypatch.setenv("EK_PERSISTENT", "maybe")
    with pytest.raises(ValueError, match="EK_PERSISTENT must be on or off; got 'maybe'"):
        taken(make_head(gradient=False))
    assert first_use.known(CPU) == {}


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "gcc"),
        OSError(28, "No space left on device"),
        subprocess.CalledProcessError(1, "gcc"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_keeps_triton_from_compiling_refuses_no_kernel(monkeypatch, error):
    def raise_(*work):
        raise error

    head = make_head(gradient=False)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "from_pointers", raise_)
        with pytest.warns(RuntimeWarning, match="its kernels cannot be compiled"):
            assert taken(head) == "torch"
    assert first_use.known(CPU) == {}
    assert taken(head) == "triton"


def test_a_kernel_that_is_slightly_wrong_is_refused(monkeypatch):
    whole = launch.merge

    def merge(work, *rest):
        whole(work, *rest)
        work.rows.entropy.mul_(1 + 1e-4)

    monkeypatch.setattr(launch, "merge", merge)
    head = make_head(gradient=False)
    with pytest.warns(RuntimeWarning) as told:
        got = ek.linear_logprob_entropy(head)
    torch.testing.assert_close(got[:3], ek.linear_logprob_entropy(head, impl="torch")[:3])
    assert "no forward kernel is right" in str(told[-1].message)
    assert all("exceeds" in answer.reason for answer in first_use.known(CPU).values())


def test_products_of_pairs_and_entropies_of_logits_are_taken_where_they_are_right():
    for op in ("support", "entropy_from_logits"):
        assert backends.resolve(op, "auto", CPU, torch.bfloat16) == "triton"
    assert {*first_use.known(CPU)} == {"support bfloat16", "entropy_from_logits bfloat16"}


@pytest.mark.parametrize("name", ["pair_dots", "pair_sums", "entropy_from_logits"])
def test_products_and_entropies_that_are_slightly_wrong_are_refused(monkeypatch, name):
    where = entropies if name == "entropy_from_logits" else pair_products
    op = "entropy_from_logits" if where is entropies else "support"
    whole = getattr(where, name)

    def off(*arguments):
        got = whole(*arguments)
        (arguments[4] if got is None else got).mul_(1 + 1e-4)
        return got

    monkeypatch.setattr(where, name, off)
    told = f"{op} float32 is not taken on .* (the error exceeds|without a live pair is written)"
    with pytest.warns(RuntimeWarning, match=told):
        assert backends.resolve(op, "auto", CPU, torch.float32) == "torch"
    assert not first_use.known(CPU)[f"{op} float32"].right


class Seen(TorchDispatchMode):
    """The operations of one thread."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def raise_error(*args):
    raise AssertionError("a hook of the caller's was called")


def test_a_check_changes_nothing_of_its_caller():
    asked = call(make_head())
    state, results = torch.get_rng_state(), []
    torch.set_default_dtype(torch.float64)
    try:
        with (
            warnings.catch_warnings(),
            torch.autocast("cpu"),
            torch.autograd.graph.saved_tensors_hooks(raise_error, raise_error),
            torch.device("meta"),
        ):
            warnings.simplefilter("error")
            for _ in range(2):
                with Seen() as seen:
                    assert backends.verified("linear_logprob_entropy", CPU, *asked)
                results.append(seen.names)
                assert torch.is_autocast_enabled("cpu")
                assert torch.empty(0).device.type == "meta"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert results == [[], []]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert len(first_use.known(CPU)) == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_check_needs_no_gradients_of_its_caller(context):
    with context():
        assert first_use.answer(Question("ratio_loss", torch.float32), CPU).right
        assert taken(make_head(gradient=False)) == "triton"
        assert not torch.is_grad_enabled()
