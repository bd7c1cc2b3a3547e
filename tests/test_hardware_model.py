"""The bounds of the kernels' check hold for right kernels that compute as GPUs do."""

from functools import partial

import pytest
import torch

from tests.marks import nan_is_meant, sampled

pytest.importorskip("triton")

from entropy_kernels._bounds import GpuArithmetic
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels.verification import head_runs
from entropy_kernels.verification.truth import check_results, three_of
from tests.hardware_model import TENSOR_CORES, hardware
from tests.mutant_cases import MUTANTS
from tests.mutants import broken

CPU = torch.device("cpu")
TOKENS, VOCABULARY = 18, 140
ALL = ("bias", "temperatures", "softcap", "ignore")
# The depth of a step is that of GPUs' tiles, or more: it changes no order of the products.
TILES = (Tile("pointer", 32, 64, 128, 4, 1, 2, 128), Tile("pointer", 32, 64, 128, 4, 1, 2))
pytestmark = [
    sampled(0.2),
    nan_is_meant,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="interprets"),
]


def judge(depth, dtype, cores, rows="peaked", names=()):
    """The checks of one head by kernels on each of `cores`, whose truths are computed once.

    Two judge each run: four fp32 orders, as in pytest, and one run of torch, as at a first use.
    """
    torch.manual_seed(0)
    shape = (TOKENS, depth, VOCABULARY)
    inputs, options = head_runs.make_inputs(shape, dtype, CPU, rows, names)
    gradients = head_runs.make_gradients(TOKENS, CPU)
    three = {orders: three_of(inputs, gradients, orders, **options) for orders in (4, 0)}
    for core in cores:
        with hardware(core):
            _, got = head_runs.ours(TILES, inputs, gradients, options)
        for orders, truths in three.items():
            arithmetic = GpuArithmetic.of(*inputs[:2], **options, emulated=orders > 0)
            yield partial(check_results, got, truths, arithmetic, dtype)


def cores_of(dtype):
    return [None] if dtype == torch.float32 else TENSOR_CORES.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("depth", "rows", "names"),
    [
        *((depth, "peaked", ()) for depth in (128, 1024)),
        *((depth, "peaked", ALL) for depth in (128, 1024)),
        *((1024, rows, ()) for rows in ("very negative", "tied", "uniform")),
        (128, "large", ()),
        (2048, "peaked", ()),
        (4096, "very negative", ()),
        (8192, "peaked", ()),
        (8192, "very negative", ()),
        (8192, "large", ALL),
    ],
)
def test_right_kernels_pass_at_every_depth(depth, rows, names, dtype):
    for check in judge(depth, dtype, cores_of(dtype), rows, names):
        check()


def test_strict_bounds_refuse_right_kernels(monkeypatch):
    """So that the allowance is needed: what it is taken from is not what passes anyway."""
    monkeypatch.setattr(GpuArithmetic, "of", lambda *_, **__: None)
    for check in judge(1024, torch.float16, [TENSOR_CORES["Ampere"]]):
        with pytest.raises(AssertionError, match="forward: error"):
            check()


# Whose error grows with no depth, and one column among many.
WRONG = {
    "an entropy without its moved maximum": "peaked",
    "a tail column let in": "uniform",
    "ties counted twice": "tied",
    "a target as any other column": "peaked",
    "a softcap without slope": "peaked",
    "a gradient over no temperature": "peaked",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [128, 8192])
@pytest.mark.parametrize("mutant", [x for x in MUTANTS if x.name in WRONG], ids=lambda x: x.name)
def test_wrong_kernels_are_refused_at_every_depth(mutant, depth, dtype):
    names = {"softcap": ("softcap",), "temperature": ("temperatures",)}
    options = tuple(x for flag in mutant.flags for x in names.get(flag, ()))
    with broken(mutant):
        for check in judge(depth, dtype, cores_of(dtype), WRONG[mutant.name], options):
            with pytest.raises(AssertionError, match="error"):
                check()
