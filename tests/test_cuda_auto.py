"""When "auto" takes csrc/cuda's kernels, what its check asks, and what the record holds for."""

import os

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import backends, device
from tests import cuda_extension
from tests.conftest import BACKENDS, params_of

pytest.importorskip("triton")

from entropy_kernels._triton.common import cutlass
from entropy_kernels._triton.common.tiles import ANY, Key, Tile
from entropy_kernels.verification import checks, command, first_use, machine
from entropy_kernels.verification.question import Question, call_of
from entropy_kernels.verification.record import Answer
from tests.gpu_options import B, L, make_head
from tests.host_waits import fake_gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ANY_CALL = checks.Sizes(), None, True
# Made up.
SOURCE = "NVIDIA H200, 2027-01-01"
MEASURED = {
    Key(op, "sm_90", dtype, ANY, ANY): (Tile("cutlass", 128, 256, 64, 12, 4, source=SOURCE),)
    for op, dtype in {
        "forward": "bfloat16",
        "dlogits": "bfloat16",
        "selection": "float32",
        "ratio_loss": "float32",
    }.items()
}


@pytest.fixture
def extension(monkeypatch):
    return cuda_extension.install(monkeypatch, cuda_extension.Extension())


def auto(op, *, gradient=True, **call):
    if op != "head":
        return backends.resolve(op, "auto", GPU, torch.float32)
    head = make_head(B * L, **call.pop("head", {}))
    if not gradient:
        head = ek.Head(head.hidden.detach(), head.weight.detach(), head.target)
    return backends.resolve_head("auto", head, **call)


@pytest.mark.parametrize("op", ["head", "selection", "ratio_loss"])
def test_auto_prefers_csrc_by_a_measured_row_alone(op, extension, monkeypatch):
    found = {"cuda": True, "triton": True}
    asked = []

    def right(op, where, *call, impl="triton"):
        asked.append(impl)
        return Answer(found[impl], "made up")

    monkeypatch.setattr(first_use, "right", right)
    with fake_gpu():
        assert auto(op) == "triton"
        assert "cuda" not in asked, "no row is measured, so nothing is asked"
        monkeypatch.setattr(cutlass, "TILES", MEASURED)
        assert auto(op) == "cuda"
        found["cuda"] = False
        assert auto(op) == "triton"
        found["cuda"] = True
        predicted = {key: (row[0]._replace(source="predicted"),) for key, row in MEASURED.items()}
        monkeypatch.setattr(cutlass, "TILES", predicted)
        assert auto(op) == "triton"
        monkeypatch.setattr(cutlass, "TILES", MEASURED)
        monkeypatch.setattr(extension, "architectures", "80 100a")
        assert auto(op) == "triton"
        monkeypatch.setattr(extension, "architectures", "80 90a")
        monkeypatch.setattr(extension, "driver_version", lambda: 12080)
        assert auto(op) == "triton"


def test_auto_prefers_csrc_for_no_part_of_a_head(extension, monkeypatch):
    """A forward of csrc/cuda and a backward of Triton differ in their last bits."""
    monkeypatch.setattr(first_use, "right", lambda *call, impl="triton": Answer(True))
    forward = {key: row for key, row in MEASURED.items() if key.op != "dlogits"}
    with fake_gpu():
        monkeypatch.setattr(cutlass, "TILES", forward)
        assert auto("head") == "triton"
        assert auto("head", gradient=False) == "cuda"
        assert auto("head", keep_logits=True) == "cuda"
        monkeypatch.setattr(cutlass, "TILES", MEASURED)
        assert auto("head", head={"size": 60}) == "triton"
        # csrc/cuda fills the first four statistics.
        assert auto("head", statistics_wanted=4) == "cuda"
        assert auto("head", statistics_wanted=5) == "triton"
        # Triton's forward stores rows at this size, and csrc/cuda's none.
        assert auto("head", head={"size": 4096}) == "cuda"
        assert auto("head", head={"size": 4096}, stored=True) == "triton"


def test_the_check_of_a_first_use_asks_about_the_tiles_of_csrc(extension, monkeypatch):
    monkeypatch.setattr(cutlass, "TILES", MEASURED)
    asked = []

    def answer(question, where, sizes=(0, 0, 0), forward=None):
        asked.append(question.text)
        return Answer("dlogits" not in question.text, "made up")

    monkeypatch.setattr(first_use, "answer", answer)
    with fake_gpu():
        head = make_head(B * L)
        call = call_of(head, keep_logits=False, stored=False, statistics=False)
        assert not first_use.right("linear_logprob_entropy", GPU, *call, impl="cuda").right
        assert first_use.right("selection", GPU, impl="cuda").right
    assert [text.split()[:3] for text in asked] == [
        ["forward", "bfloat16", "cutlass"],
        ["dlogits", "bfloat16", "cutlass"],
        ["selection", "float32", "cuda"],
    ]


@pytest.mark.parametrize("op", ["selection", "ratio_loss"])
def test_kernels_of_csrc_that_write_nothing_are_refused(op, extension):
    for case in checks.cases(Question(op, torch.float32, flags=("cuda",)), CPU, *ANY_CALL):
        extension.calls.clear()
        assert checks.reason_of(case) is not None
        assert extension.launched[0] == {"selection": "radix_histogram"}.get(op, op)


def questions():
    return [asked.question for asked in command.questions(GPU)]


def test_verify_asks_about_csrc_where_it_is_loaded(monkeypatch):
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(device, "architecture", lambda where: "sm_90")
    without = questions()
    assert not [one for one in without if "cutlass" in one.text or "cuda" in one.flags]
    extension = cuda_extension.install(monkeypatch, cuda_extension.Extension())
    found = questions()
    assert [one for one in found if one in without] == without
    more = [one for one in found if one not in without]
    assert {one.text for one in more if one.tile is None} == {
        "selection float32 cuda",
        "ratio_loss float32 cuda",
    }
    head = [one for one in more if one.tile is not None]
    assert {(one.op, one.tile.variant) for one in head} == {
        ("forward", "cutlass"),
        ("dlogits", "cutlass"),
    }
    assert {str(one.dtype) for one in head} == {"torch.bfloat16"}
    flags = {flag for one in head for flag in one.flags}
    assert flags == {"bias", "temperature", "softcap", "statistics", "keep_logits", "stored"}
    monkeypatch.setattr(extension, "architectures", "100a")
    assert not [one for one in questions() if "cutlass" in one.text]


def test_the_record_holds_for_the_text_of_csrc_that_is_loaded(monkeypatch):
    before = machine.machine(CPU)
    extension = cuda_extension.install(monkeypatch, cuda_extension.Extension())
    after = machine.machine(CPU)
    assert after == before | {"csrc/cuda": extension.sources}
    assert machine.folder_name(after) != machine.folder_name(before)


def test_the_tests_of_the_head_are_collected_for_csrc_everywhere():
    marks = {
        x.id: {mark.name for mark in x.marks} for x in params_of([*BACKENDS, ("cuda", "cuda")])
    }
    assert "gpu" in marks.pop("cuda on cuda")
    assert not any("gpu" in names for names in marks.values())
    assert ("cuda", "cuda") in BACKENDS or "EK_TEST_IMPLS" in os.environ
