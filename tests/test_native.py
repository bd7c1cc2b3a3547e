"""The compiled extensions: how they load, and the radix histogram against NumPy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_kernels import _extensions, _native

WHY_MISSING = _native.why_missing("cpu")
needs_cpu = pytest.mark.skipif(WHY_MISSING is not None, reason=WHY_MISSING or "built")

INFINITY, LARGEST, SMALLEST = float("inf"), float(np.finfo(np.float32).max), 1e-45
NAN_BITS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
EDGES = np.concatenate(
    [
        np.float32([0.0, -0.0, SMALLEST, -SMALLEST, 1.0, -1.0, LARGEST, -LARGEST]),
        np.float32([INFINITY, -INFINITY]),
        NAN_BITS.view(np.float32),
    ]
)
VALUES = {
    "empty": lambda rng: np.zeros(0, np.float32),
    "one": lambda rng: np.float32([0.7]),
    "edges": lambda rng: EDGES,
    "any bits": lambda rng: rng.integers(0, 1 << 32, 100_003, np.uint32).view(np.float32),
    "entropies": lambda rng: rng.exponential(size=300_007).astype(np.float32),
    "ties": lambda rng: rng.integers(-3, 4, 10_007).astype(np.float32) / 4,
    "a block": lambda rng: rng.normal(size=1024).astype(np.float32),
    "a block + 1": lambda rng: rng.normal(size=1025).astype(np.float32),
}
PASSES = [(21, 11, 0), (10, 11, 11), (0, 10, 22), (13, 19, 0), (31, 1, 0), (0, 11, 32)]


def numpy_keys(values: np.ndarray) -> np.ndarray:
    """uint32 keys that order like the numbers; -0 is +0, NaN the largest."""
    bits = np.where(values == 0, np.float32(0), values).view(np.uint32)
    flips = np.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000).astype(np.uint32)
    return np.where(np.isnan(values), 0xFFFFFFFF, bits ^ flips).astype(np.uint64)


def numpy_histogram(values, mask, prefix, shift, bits, prefix_bits) -> np.ndarray:
    """int64 [2**bits]: how many valid keys that start with `prefix` carry each digit."""
    keys = numpy_keys(values)
    counted = mask & (keys >> (32 - prefix_bits) == prefix)
    digits = keys[counted] >> shift & ((1 << bits) - 1)
    return np.bincount(digits.astype(np.int64), minlength=1 << bits)


def test_built_where_required():
    if os.environ.get("EK_REQUIRE_NATIVE") == "1":
        assert WHY_MISSING is None


@needs_cpu
@pytest.mark.parametrize("digit", PASSES, ids="shift={0[0]} bits={0[1]} prefix={0[2]}".format)
@pytest.mark.parametrize("valid", [None, 0.0, 0.6], ids="valid={}".format)
@pytest.mark.parametrize("name", VALUES)
def test_radix_histogram_equals_numpy(name, valid, digit):
    shift, bits, prefix_bits = digit
    rng = np.random.default_rng(0)
    values = VALUES[name](rng)
    mask = np.ones(len(values), bool) if valid is None else rng.random(len(values)) < valid
    keys = numpy_keys(values)
    prefixes = {0} | {int(key) >> (32 - prefix_bits) for key in keys[:20]}
    for prefix in prefixes:
        counts = torch.full((1 << bits,), 5)
        _native.radix_histogram(
            torch.from_numpy(values.copy()),
            None if valid is None else torch.from_numpy(mask),
            prefix,
            shift,
            bits,
            prefix_bits,
            counts,
        )
        expected = numpy_histogram(values, mask, prefix, shift, bits, prefix_bits)
        np.testing.assert_array_equal(counts.numpy() - 5, expected)


@needs_cpu
def test_passes_find_the_kth_largest():
    values = torch.from_numpy(EDGES.copy()).repeat(997)
    for k in (1, 997, 4 * 997 + 1, 7 * 997, values.numel()):
        prefix, prefix_bits, rank = 0, 0, k
        for shift, bits in ((21, 11), (10, 11), (0, 10)):
            counts = torch.zeros(1 << bits, dtype=torch.int64)
            _native.radix_histogram(values, None, prefix, shift, bits, prefix_bits, counts)
            above = counts.flip(0).cumsum(0).flip(0)
            digit = int((above >= rank).nonzero().max())
            rank -= int(above[digit] - counts[digit])
            prefix, prefix_bits = prefix << bits | digit, prefix_bits + bits
        assert prefix == np.sort(numpy_keys(values.numpy()))[-k]


@needs_cpu
def test_same_counts_at_any_number_of_threads():
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 2048, dtype=torch.int64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _native.radix_histogram(values, None, 0, 21, 11, 0, counts[threads - 1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(counts[0], counts[1])
    assert counts[0].sum() == values.numel()


@needs_cpu
def test_denormals_count_where_they_are_flushed():
    values = torch.tensor([SMALLEST, -SMALLEST, 0.0])
    expected = numpy_histogram(values.numpy(), np.ones(3, bool), 0, 21, 11, 0)
    counts = torch.zeros(2048, dtype=torch.int64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        _native.radix_histogram(values, None, 0, 21, 11, 0, counts)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(counts.numpy(), expected)


@needs_cpu
def test_radix_histogram_asserts_what_it_cannot_read():
    values, counts = torch.zeros(8), torch.zeros(2048, dtype=torch.int64)
    with pytest.raises(AssertionError):
        _native.radix_histogram(values.double(), None, 0, 21, 11, 0, counts)
    with pytest.raises(AssertionError):
        _native.radix_histogram(values[::2], None, 0, 21, 11, 0, counts)
    with pytest.raises(AssertionError):
        _native.radix_histogram(values, torch.ones(7, dtype=torch.bool), 0, 21, 11, 0, counts)
    with pytest.raises(AssertionError):
        _native.radix_histogram(values, None, 0, 22, 11, 0, counts)
    with pytest.raises(AssertionError):
        _native.radix_histogram(values, None, 0, 21, 11, 0, counts[:1024])


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    code = (
        "from entropy_kernels import _native; assert _native.cpu() is not None\n"
        "for line in open('/proc/self/maps'): print(line.split()[-1])"
    )
    loaded = set(_run_python(code).split())
    runtimes = {path for path in loaded if Path(path).name.startswith(("libgomp", "libomp"))}
    assert len(runtimes) <= 1, runtimes


def test_why_missing_names_the_extension_and_where_it_is_not():
    folder = Path(_extensions.__file__).parent
    assert _native.why_missing("nothing") == (
        f"entropy_kernels._nothing is not built: {folder} has none; "
        "reinstall with a C++ compiler on PATH"
    )


def test_blocked_extension_is_none_and_explained():
    code = (
        "import sys; sys.modules['entropy_kernels._cpu'] = None\n"
        "from entropy_kernels import _native\n"
        "assert _native.cpu() is None; print(_native.why_missing('cpu'))"
    )
    assert _run_python(code).startswith("entropy_kernels._cpu does not load: ModuleNotFoundError")


def test_broken_extension_does_not_load(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: omp_get_max_threads")

    monkeypatch.setattr(_extensions.importlib, "import_module", broken)
    _extensions.load.cache_clear()
    try:
        assert _native.cpu() is None
        assert _native.why_missing("cpu").startswith(
            "entropy_kernels._cpu does not load: ImportError: undefined symbol"
        )
    finally:
        _extensions.load.cache_clear()


def _run_python(code: str) -> str:
    """The standard output of `code` in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
