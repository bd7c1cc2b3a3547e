"""What Liger raises, we raise, call by call; where not, the table in our docstring says so."""

import contextlib
import re

import numpy as np
import pytest
import torch

from entropy_kernels.integrations.liger import LinearScaledCrossEntropy

liger = pytest.importorskip(
    "liger_kernel.ops.fused_linear_scaled_cross_entropy", reason="the peer's own fallback"
)
Liger = liger.LigerFusedLinearScaledCrossEntropyFunction
# Ours are those of the package's public functions, without the checks of the tests' import hook.
pytestmark = pytest.mark.usefixtures("unchecked_shapes")

generator = torch.Generator().manual_seed(0)
H, W = torch.randn(4, 8, generator=generator), torch.randn(16, 8, generator=generator)
Y = torch.tensor([1, 2, 3, 4])
META = {"_input": H.to("meta"), "weight": W.to("meta"), "target": Y.to("meta")}
FLOAT8 = torch.float8_e4m3fn


def ids(*values, **options):
    return {"selected_token_ids": torch.tensor(values, dtype=torch.int64, **options)}


REFUSED = {
    "input of three axes": {"_input": H[:, None]},
    "input of one axis": {"_input": H[0]},
    "weight of one axis": {"weight": W[0]},
    "weight of three axes": {"weight": W[None]},
    "weight of another width": {"weight": W[:, :4]},
    "target of two axes": {"target": Y[:, None]},
    "target of no axis": {"target": Y[0]},
    "target of another length": {"target": Y[:2]},
    "target out of range": {"target": torch.tensor([0, 16, 0, 0])},
    "target negative": {"target": torch.tensor([0, -1, 0, 0])},
    "target the usual ignore_index, which is another": {"target": Y - 101, "ignore_index": 0},
    "no hidden": {"_input": H[:, :0], "weight": W[:, :0]},
    "no vocabulary": {"weight": W[:0], "target": Y * 0 - 100},
    "input elsewhere": {"_input": META["_input"]},
    "weight elsewhere": {"weight": META["weight"]},
    "target elsewhere": {"target": META["target"]},
    "two dtypes": {"_input": H.bfloat16()},
    "two dtypes and shapes": {"_input": H[:, :4].bfloat16()},
    "integers": {"_input": H.long(), "weight": W.long()},
    "complex": {"_input": H.cfloat(), "weight": W.cfloat()},
    "bool": {"_input": H > 0, "weight": W > 0},
    "target of int32": {"target": Y.int()},
    "target of uint8": {"target": Y.byte()},
    "target of fp32": {"target": Y.float()},
    "target of bool": {"target": Y > 1},
    "temperature 0": {"temperature": 0.0},
    "temperature -1": {"temperature": -1},
    "temperature inf": {"temperature": float("inf")},
    "temperature nan": {"temperature": float("nan")},
    "temperature without end": {"temperature": 10**400},
    "temperature a word": {"temperature": "cold"},
    "temperature a bool": {"temperature": True},
    "temperature None": {"temperature": None},
    "temperature a tensor": {"temperature": torch.tensor(1.0)},
    "temperature of numpy's fp32": {"temperature": np.float32(1)},
    "ignore_index None": {"ignore_index": None},
    "ignore_index a word": {"ignore_index": "pad"},
    "ignore_index beyond int64": {"ignore_index": 2**70},
    "no tiles": {"m_tiles_per_cluster": 0},
    "half a tile": {"m_tiles_per_cluster": 1.5},
    "tiles a bool": {"m_tiles_per_cluster": True},
    "tiles None": {"m_tiles_per_cluster": None},
    "tiles of numpy": {"m_tiles_per_cluster": np.int64(1)},
    "return_entropy a number": {"return_entropy": 2.0},
    "return_entropy 1": {"return_entropy": 1},
    "return_entropy None": {"return_entropy": None},
    "ids a list": {"selected_token_ids": [1, 2]},
    "ids a number": {"selected_token_ids": 3},
    "ids of int32": {"selected_token_ids": Y.int()},
    "ids of fp32": {"selected_token_ids": Y.float()},
    "ids of bool": {"selected_token_ids": Y > 1},
    "ids of two axes": {"selected_token_ids": Y[None]},
    "ids of two axes and int32": {"selected_token_ids": Y[None].int()},
    "ids of no axis": {"selected_token_ids": Y[0]},
    "ids elsewhere": {"selected_token_ids": META["target"]},
    "ids out of range": ids(0, 16),
    "ids negative": ids(-1),
    "ids ignore_index": ids(-100),
    "no ids of fp32": {"selected_token_ids": H[0, :0]},
    "an unknown option": {"softcap": 30.0},
    "a bias": {"bias": W[:, 0]},
    "shape and temperature": {"_input": H[0], "temperature": "cold"},
    "temperature and ids": {"temperature": 0.0, "selected_token_ids": [1]},
    "tiles and shape": {"m_tiles_per_cluster": 1.5, "_input": H[0]},
    "dtype and temperature": {"_input": H.half(), "temperature": 0.0},
}
TAKEN = {
    "all ignored": {"target": Y * 0 - 100},
    "ignore_index inside": {"ignore_index": 3},
    "ignore_index a tensor": {"ignore_index": Y[2]},
    "ignore_index a bool": {"ignore_index": True},
    "ignore_index of numpy": {"ignore_index": np.int32(3)},
    "ignore_index far": {"ignore_index": 2**62},
    "temperature an int": {"temperature": 2},
    "temperature of numpy's fp64": {"temperature": np.float64(0.7)},
    "three tiles": {"m_tiles_per_cluster": 3},
    "no ids": ids(),
    "ids repeated": ids(3, 0, 3),
    "ids beside an ignored target": ids(1, 1) | {"target": torch.tensor([1, -100, 2, 3])},
    "ids of other strides": {"selected_token_ids": torch.arange(8)[::3]},
    "input of other strides": {"_input": H.T.contiguous().T},
    "weight of other strides": {"weight": W.T.contiguous().T},
    "target of other strides": {"target": torch.arange(8)[::2]},
    "one row many times": {"_input": H[:1].expand(4, 8)},
    "a NaN": {"_input": H.masked_fill(H > 1, torch.nan)},
    "entropies": {"return_entropy": True},
}


def call(function, given):
    """The outputs, as a tuple; or the exception."""
    try:
        found = function.apply(**({"_input": H, "weight": W, "target": Y} | given))
    except Exception as error:
        return error
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", REFUSED)
def test_the_same_exception(name):
    theirs, ours = (call(f, REFUSED[name]) for f in (Liger, LinearScaledCrossEntropy))
    assert isinstance(theirs, Exception)
    assert type(ours) is type(theirs), f"{ours!r} against {theirs!r}"


@pytest.mark.parametrize("name", TAKEN)
def test_the_same_outputs(name):
    theirs, ours = (call(f, TAKEN[name]) for f in (Liger, LinearScaledCrossEntropy))
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


# What the table's rows give; those that need a GPU are left to one.
DIFFERENT = {
    "no tensor": {"weight": None},
    "T = 0": {"_input": H[:0], "target": Y[:0]},
    "fp64": {"_input": H.double(), "weight": W.double()},
    "float8": {"_input": H.to(FLOAT8), "weight": W.to(FLOAT8)},
    "two dtypes, under autocast": {"_input": H.bfloat16()},
    "tensors on meta": META,
    "ignore_index a float": {"ignore_index": 3.0},
    "temperature beyond fp32": {"temperature": 1e-39},
}


def rows():
    """{given: (Liger's, ours)} of the docstring's table."""
    lines = LinearScaledCrossEntropy.apply.__doc__.partition("has the other differences:")[2]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines.splitlines() if line.strip()]
    assert cells[0] == ["given", "Liger", "here"]
    return {given: results for given, *results in cells[1:]}


def outcome(result):
    return type(result).__name__ if isinstance(result, Exception) else "outputs"


def test_the_table_has_these_rows():
    assert {name for name in rows() if not name.endswith("GPU")} == set(DIFFERENT)


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_table_of_differences(name):
    cast = torch.autocast("cpu", torch.bfloat16) if "autocast" in name else contextlib.nullcontext()
    with cast:
        found = [call(f, DIFFERENT[name]) for f in (Liger, LinearScaledCrossEntropy)]
    for result, said in zip(found, rows()[name], strict=True):
        assert outcome(result) == (said if said.endswith("Error") else "outputs"), repr(result)
    if "autocast" in name:
        (nll,) = call(LinearScaledCrossEntropy, {"_input": H.bfloat16(), "weight": W.bfloat16()})
        assert torch.equal(found[1][0], nll)
    if name == "ignore_index a float":
        assert torch.equal(found[0][0] == 0, Y == 3)


@pytest.mark.parametrize("name", ["_input", "weight", "target"])
def test_a_list_is_no_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor; got list"):
        LinearScaledCrossEntropy.apply(**{"_input": H, "weight": W, "target": Y} | {name: [1.0]})


def test_both_bounds_of_the_temperature():
    for temperature in (1e-39, 1e39):
        with pytest.raises(ValueError, match="temperature must lie in fp32's"):
            LinearScaledCrossEntropy.apply(H, W, Y, temperature)


@pytest.mark.parametrize("entropy", [False, True])
def test_no_tokens(entropy):
    given = {"_input": H[:0], "target": Y[:0], "return_entropy": entropy} | ids(3, 3)
    *per_token, selected = call(LinearScaledCrossEntropy, given)
    assert [tuple(x.shape) for x in per_token] == [(0,)] * (1 + entropy)
    assert tuple(selected.shape) == (0, 2)


def test_messages_say_what_came_and_what_was_wanted():
    for given, message in {
        "weight of another width": r"weight \[V, D\].*got \(4, 8\), \(16, 4\) and \(4,\)",
        "two dtypes": r"one dtype out of .*got torch.bfloat16 and torch.float32",
        "ids out of range": r"selected_token_ids must lie in \[0, 16\); got 16",
        "ids elsewhere": r"selected_token_ids must be on cpu, like weight; got meta",
        "ignore_index a word": r"ignore_index must be an int; got 'pad'",
    }.items():
        error = call(LinearScaledCrossEntropy, REFUSED[given])
        assert re.search(message, str(error)), error
