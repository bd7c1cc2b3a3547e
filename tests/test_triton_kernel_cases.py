"""The cases that a GPU has to pass, on it or at small sizes in Triton's interpreter."""

import pytest
import torch

from tests.marks import nan_is_meant, sampled

pytest.importorskip("triton")

from benchmarks.gpu import candidates
from entropy_kernels import device
from entropy_kernels._triton.common import partition
from entropy_kernels._triton.head_backward import launch as head_backward
from entropy_kernels._triton.head_backward import launch_rows
from entropy_kernels._triton.head_forward import launch_store, launch_variants
from entropy_kernels._triton.ratio_loss import launch as ratio_loss
from entropy_kernels._triton.selection import launch as selection
from entropy_kernels.verification.head_cases import head_cases
from entropy_kernels.verification.logit_cases import entropy_cases
from entropy_kernels.verification.offset_cases import offset_cases
from entropy_kernels.verification.pair_cases import support_cases
from entropy_kernels.verification.token_cases import ratio_loss_cases, selection_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = candidates.pairs(device.architecture(DEVICE), quick=False)
pytestmark = [sampled(0.2), nan_is_meant]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Few tokens and words make several blocks of each kernel."""
    for module, constants in (
        (launch_variants, {"WORKSPACE_BYTES": 0, "WORKSPACE_BLOCK": 32}),
        (launch_store, {"BLOCK": 16}),
        (launch_rows, {"BLOCK": 16}),
        (head_backward, {"CHUNK_V": 64, "DZ_BYTES": 0}),
        (ratio_loss, {"BLOCK": 64}),
        (selection, {"HISTOGRAM_BLOCK": 128, "LARGEST_BLOCK": 128}),
        (partition, {"MAX_PROGRAMS": 2}),
    ):
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


def every_head_case():
    """The tiles in fp32, but for cuBLAS, whose other order of sums shows there; and in 16 bits."""
    for pair in PAIRS:
        if pair[0] is None:
            dtype = torch.float16
        else:
            dtype = torch.bfloat16 if pair[0].variant == "cublas" else torch.float32
        name = f"{candidates.name(pair[0])} + {candidates.name(pair[1])}, {dtype}"
        for case in head_cases(pair, dtype, DEVICE, small=True):
            yield pytest.param(case.run, id=f"{name}: {case.name}")


@pytest.mark.parametrize("run", list(every_head_case()))
def test_head(run):
    run()


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(case.run, id=case.name)
        for case in (
            *offset_cases(PAIRS[0], torch.float32, DEVICE, small=True),
            *ratio_loss_cases("triton", DEVICE, small=True),
            *selection_cases("triton", DEVICE, small=True),
            *support_cases(torch.bfloat16, DEVICE, small=True),
            *entropy_cases(torch.bfloat16, DEVICE),
        )
    ],
)
def test_what_is_not_a_plain_head(run):
    run()
