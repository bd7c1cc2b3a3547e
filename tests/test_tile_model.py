"""The model of AMX's tile instructions against exact arithmetic, and the misuse that it refuses.

tile_model.cpp, which runs the model and products on it, is compiled here.
"""

import math
import os
import platform
import shlex
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
CXX = shlex.split(os.environ.get("CXX", "")) or ["c++"]
FLAGS = ("-std=c++17", "-O1", "-mavx2", "-mfma", "-fopenmp", "-ffp-contract=fast")
DEFINITIONS = ("-DEK_ISA=tested", '-DEK_NAME="tested"', "-DEK_LANES=8")
WHY_NOT = (
    "the model is of x86 instructions"
    if platform.machine() not in ("x86_64", "AMD64")
    else f"{CXX[0]} is not on PATH"
    if shutil.which(CXX[0]) is None
    else None
)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
FAULTS = ["none", "swapped_columns", "repeated_rows", "kept_sums"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The compiled tile_model.cpp."""
    out = tmp_path_factory.mktemp("tile_model") / "tile_model"
    source = ROOT / "tests" / "tile_model.cpp"
    command = (*CXX, *FLAGS, *DEFINITIONS, "-I", ROOT / "csrc" / "cpu", source, "-o", out)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def as_fp32(bits: np.ndarray) -> np.ndarray:
    """Converts bf16 to fp32, and subnormals to zero."""
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)


def rounded(x: Fraction) -> float:
    """Rounds to 24 bits, ties to even. Subnormal results are zero, too large ones are inf."""
    if x == 0:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    value = round(x / unit) * unit
    if abs(value) < Fraction(2) ** -126:
        return 0.0
    return float(value) if abs(value) < Fraction(2) ** 128 else math.copysign(math.inf, x)


def fma(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    return rounded(Fraction(a) * Fraction(b) + Fraction(c))


def exact_dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """TDPBF16PS of Intel's manual: c [M, N] += a b, with bf16 bits in a [M, K, 2], b [K, N, 2]."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        a, b = as_fp32(a).astype(float), as_fp32(b).astype(float)
    c = np.where(np.abs(c) < np.finfo(np.float32).tiny, np.float32(0), c)
    out = np.empty_like(c)
    for m, n in np.ndindex(c.shape):
        even = odd = 0.0
        for left, right in zip(a[m].tolist(), b[:, n].tolist(), strict=True):
            even = fma(left[0], right[0], even)
            odd = fma(left[1], right[1], odd)
        out[m, n] = fma(fma(even, 1.0, odd), 1.0, float(c[m, n]))
    return out


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def operand(rng, shape, exponents, special) -> np.ndarray:
    """Bits of normal values times powers of two."""
    values = bf16(rng.standard_normal(shape) * 2.0 ** rng.choice(exponents, shape))
    for bits in (0x7F81, 0x7F80, 0xFF80) if special else ():  # a signalling NaN, inf, -inf
        values[rng.random(shape) < 0.003] = bits
    return values


# Exponents of a, b and c.
CASES = {
    "ordinary": ([0], [0], [0]),
    "results about the smallest": ([-63, -62], [-65, -64], [-126, -125]),
    "subnormal operands": ([-128, -127], [0, 1], [-127, -126, -125]),
    "results beyond the largest": ([0, 60, 66], [0, 60, 66], [0, 120]),
    "NaN and inf": ([0], [0], [0]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(16, 16, 16), (1, 1, 1), (5, 16, 3), (16, 7, 16)], ids=str)
def test_dot_is_the_manual_s_to_the_bit(program, case, shape):
    rng = np.random.default_rng(0)
    M, K, N = shape
    shapes = (M, K, 2), (K, N, 2), (M, N)
    special = case == "NaN and inf"
    a, b, c = (operand(rng, *x, special) for x in zip(shapes, CASES[case], strict=True))
    c = (c.astype(np.uint32) << 16 | 0x1234).view(np.float32)
    command = [program, "dot", *map(str, shape)]
    operands = a.tobytes() + b.tobytes() + c.tobytes()
    done = subprocess.run(command, input=operands, capture_output=True, check=True)
    got = np.frombuffer(done.stdout, np.float32).reshape(M, N)
    want = exact_dot(a, b, c)
    np.testing.assert_array_equal(got, want)
    if shape == (16, 16, 16):  # the cases are what they are called
        smallest = np.finfo(np.float32).tiny
        assert ((want == 0) & (c != 0)).any() == (case in list(CASES)[1:3])
        assert (np.abs(want) >= smallest).any()
        assert (~np.isfinite(want)).any() == (case in list(CASES)[3:])


@pytest.mark.parametrize(
    "what",
    [
        *("no configuration", "released", "palette", "reserved bytes", "a ninth register"),
        *("too many rows", "too long rows", "rows of no bytes", "register left out"),
        *("rows of c", "columns of b", "pairs of a", "half a pair"),
    ],
)
def test_misuse_ends_the_process(program, what):
    done = subprocess.run([program, "misuse", what], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "the model of tile instructions was given wrong" in done.stderr


def test_right_use_does_not(program):
    subprocess.run([program, "misuse", "nothing"], check=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_at_first_use_finds_wrong_instructions(program, fault):
    command = [program, "agrees", str(FAULTS.index(fault))]
    done = subprocess.run(command, check=False)
    assert done.returncode == (0 if fault == "none" else 1)
