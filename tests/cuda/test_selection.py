"""The CUDA kernels of the selection, on fibers: to the bit as the sort and as the torch path."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_kernels import _radix, reference
from entropy_kernels._torch import selection
from entropy_kernels.verification.token_cases import (
    KINDS,
    assert_same_bits,
    masks_of,
    values_of,
)
from tests.selection_cases import FRACTIONS, VALUES

from . import host

INF, NAN = math.inf, math.nan
PROGRAM = [host.HERE / "selection_host.cpp"]
DIGITS = [(21, 11, 0), (10, 11, 11), (0, 10, 22), (13, 19, 0)]
ROUND = 4096  # values that a block reads at once; seven more than held in registers are read again
ALL = ("0", "40000", "0", "1")  # every size, and the seeds of two schedules
# With 128 threads of a block, of which sanitizers and mutants take less time.
FEW_THREADS = ["-DEK_SELECTION_THREADS=128"]
ONE_BLOCK, BLOCKS, MANY = ("257", "257"), ("4097", "4097"), ("0", "5100")
ROUNDS = ("600002", "600002")  # more than the blocks of a grid read at once
KEYS, SCAN, SELECT = "keys.h", "block_scan.h", "selection.cu"
# Name, the sanitizer that must notice or "", the sizes, the file, what stands there and what comes.
MUTANTS = [
    ("no barrier before the first count", "thread", ONE_BLOCK, SELECT,
     "rounds);\n  __syncthreads();\n  unsigned prefix", "rounds);\n  unsigned prefix"),
    ("no barrier after the count", "thread", ONE_BLOCK, SELECT,
     "__syncthreads();\n    int const lower", "int const lower"),
    ("no barrier after the pick", "thread", ONE_BLOCK, SELECT,
     "__syncthreads();\n    // The last", "// The last"),
    ("no barrier in the scan", "thread", ONE_BLOCK, SCAN, "__syncthreads();", ""),
    ("no barrier between ties and ranks", "thread", ONE_BLOCK, SELECT,
     "__syncthreads();\n  mine =", "mine ="),
    ("a count that is not atomic", "thread", ONE_BLOCK, SELECT,
     "if (counted) atomicAdd(&histogram[digit], 1u)", "if (counted) ++histogram[digit]"),
    ("a count of all blocks that is not atomic", "thread", BLOCKS, SELECT,
     "atomicAdd(&counts[bin], static_cast<unsigned long long>(histogram[bin]))",
     "counts[bin] += histogram[bin]"),
    ("a barrier for the ranked alone", "", ONE_BLOCK, SELECT,
     "if (lane == 0) warps[warp] = mine;\n  __syncthreads();",
     "if (lane == 0) {\n    warps[warp] = mine;\n    __syncthreads();\n  }"),
    ("values read past their end", "address", MANY, KEYS,
     "whole && aligned(values.value + at", "aligned(values.value + at"),
    ("values at any address", "address", MANY, KEYS,
     "aligned(values.value + at, sizeof x)", "true"),
    ("mask at any address", "address", MANY, SELECT, "aligned(values.mask, sizeof(uchar4)) &&", ""),
    ("mask of a group at any address", "address", MANY, KEYS,
     "aligned(values.mask + at, sizeof valid)", "true"),
    ("selected at any address", "address", MANY, SELECT,
     "aligned(out.selected, sizeof(uchar4))", "true"),
    ("mask written past its end", "address", MANY, KEYS,
     "bool const whole = at + 4 <= count;", "bool const whole = at < count;"),
    ("group that the end cuts left out", "", MANY, KEYS, "if (has_cut_) f(", "if (false) f("),
    ("NaN with a sign below all", "", MANY, KEYS, "return (bits & ~kSign) > k", "return bits > k"),
    ("-0 below +0", "", MANY, KEYS, "key += key == ~kSign;", ""),
    ("masked values counted", "address", MANY, KEYS, "<< 8 * byte) != 0)", "<< 8 * byte) != 9)"),
    ("a share rounded down", "", MANY, KEYS, "(ceil(static_cast<double>(n)", "(floor(double(n)"),
    ("bins kept from digit to digit", "", MANY, SELECT,
     "*bins = {0, 0};\n    if (fixed", "if (fixed"),
    ("a digit short of a bit", "", MANY, SELECT, "shift & (kBins - 1)", "shift & (kBins - 2)"),
    ("digits of all values", "", MANY, SELECT, "((key[j] ^ prefix) & fixed) == 0", "true"),
    ("quota one too many", "", MANY, SELECT, "(tie && ties < quota)", "(tie && ties <= quota)"),
    ("ties of this warp twice", "", MANY, SELECT, "= lane < warp ?", "= lane <= warp ?"),
    ("rows without the ties before", "", MANY, SELECT,
     "0xffff) + (ties < quota ? ties : quota)", "0xffff)"),
    ("no ties where none are cut", "", MANY, SELECT, "all = quota > 0", "all = false"),
    ("ties of one round", "", MANY, SELECT, "before.ties += warp >> 16", "before.ties += 0"),
    ("threshold of nothing", "", MANY, SELECT,
     "n > 0 ? bits_of_key(prefix)", "true ? bits_of_key(prefix)"),
    ("no bin for no value", "address", MANY, SELECT, " && threadIdx.x != 0)", ")"),
    ("quota of the upper bin", "address", MANY, SELECT, "before - upper, lower}", "before, lower}"),
    ("one of many equal lanes", "", MANY, SELECT, "(__popc(same))", "(1)"),
    ("ties of this block twice", "", MANY, SELECT,
     "b < blockIdx.x; b += kThreads", "b <= blockIdx.x; b += kThreads"),
    ("ties of one round of a block", "", ROUNDS, SELECT,
     "* rounds * kRound;\n  int ties", "* kRound;\n  int ties"),
    ("blocks of one round", "", ROUNDS, SELECT,
     "* rounds * kRound;\n  Keys<0> const", "* kRound;\n  Keys<0> const"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("selection")


class Kernels:
    """The kernels with the signatures of `_torch/selection.py`."""

    def __init__(self, library):
        self.library = library

    def _call(self, name, *arguments):
        given = [
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments
        ]
        getattr(self.library, name)(*given)

    def schedule(self, seed, preempt):
        self.library.schedule(ctypes.c_uint(seed), ctypes.c_bool(preempt))

    def top(self, values, mask, fraction):
        """threshold, quota, equal, selected, and the rows."""
        scalars = torch.empty(()), torch.tensor(-7), torch.tensor(-7)
        selected = torch.full(values.shape, 9, dtype=torch.uint8)
        rows, number = torch.full(values.shape, -7, dtype=torch.int32), torch.tensor([-7]).int()
        count, share = ctypes.c_int64(len(values)), ctypes.c_double(selection.exact_share(fraction))
        self._call("top", values, mask, count, share, *scalars, selected, rows, number)
        return *scalars, selected.bool(), rows[: int(number)]

    def radix_histogram(self, values, mask, prefix, shift, bits, prefix_bits):
        counts = torch.zeros(1 << bits, dtype=torch.int64)
        count = ctypes.c_int64(len(values))
        digit = (prefix, shift, bits, prefix_bits)
        self._call("radix_histogram", values, mask, count, *digit, counts)
        return counts

    def radix_pick(self, counts, local, prefix, remaining, share, shift):
        found = [torch.tensor(-7), torch.tensor(-7), torch.tensor(-7), torch.tensor(-7.0)]
        bits = counts.numel().bit_length() - 1
        given = (counts, local, prefix, remaining, ctypes.c_double(share), shift, bits)
        self._call("radix_pick", *given, *found)
        return (*found,)

    def select_largest(self, values, mask, threshold, quota):
        selected = torch.full(values.shape, 9, dtype=torch.uint8)
        count = ctypes.c_int64(len(values))
        self._call("select_largest", values, mask, count, threshold, quota, selected)
        return selected.bool()


@pytest.fixture(scope="module")
def kernels(folder):
    return Kernels(ctypes.CDLL(str(host.build(folder / "library", PROGRAM, library=True))))


def assert_as_the_sort(kernels, values, mask, fraction):
    threshold, quota, equal, selected, rows = kernels.top(values, mask, fraction)
    assert_same_bits(threshold, reference.entropy_threshold(values, mask, fraction))
    kth = _radix.kth_largest([(values, mask)], fraction, None, "torch")
    assert_same_bits(quota, kth.quota)
    assert_same_bits(equal, kth.equal)
    want = reference.top_entropy_mask(values, mask, fraction)
    assert torch.equal(selected, want)
    assert torch.equal(rows.long(), want.nonzero()[:, 0])


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.lists(st.tuples(VALUES, st.booleans()), max_size=40),
    fraction=st.sampled_from(FRACTIONS),
)
def test_top_equals_the_sort(kernels, tokens, fraction):
    values = torch.tensor([value for value, _ in tokens], dtype=torch.float32)
    mask = torch.tensor([valid for _, valid in tokens], dtype=torch.bool)
    for valid in (None, mask):
        assert_as_the_sort(kernels, values, valid, fraction)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 127, 2 * ROUND - 1, 2 * ROUND + 1])
def test_top_of_every_kind(kernels, kind, count):
    values = values_of(kind, count, "cpu")
    for seed, mask in enumerate(masks_of(count, "cpu")):
        kernels.schedule(seed, seed == 2)
        assert_as_the_sort(kernels, values, mask, 0.2)


@pytest.mark.parametrize("count", [8 * ROUND, 8 * ROUND + 1, 32 * ROUND])
def test_top_of_keys_in_registers_and_read_again(kernels, count):
    kernels.schedule(0, False)
    assert_as_the_sort(kernels, values_of("tied", count, "cpu"), masks_of(count, "cpu")[1], 0.2)


@pytest.mark.parametrize("kind", ["tied", "equal", "broken"])
@pytest.mark.parametrize(("shift", "bits", "prefix_bits"), DIGITS)
def test_counts_are_those_of_the_torch_path(kernels, kind, shift, bits, prefix_bits):
    values = values_of(kind, 8200, "cpu")
    keys = (selection.sort_keys(values) ^ selection.SIGN).to(torch.int64) & 0xFFFFFFFF
    heads = torch.cat([keys.mode().values[None], keys[:1], keys.max()[None] + 1])
    for seed, prefix in enumerate(heads >> (32 - prefix_bits)):
        kernels.schedule(seed, seed == 1)
        arguments = (values, masks_of(8200, "cpu")[seed % 2], prefix, shift, bits, prefix_bits)
        want = selection.radix_histogram(*arguments)
        assert_same_bits(kernels.radix_histogram(*arguments), want)


@pytest.mark.parametrize("bits", [1, 10, 11])
def test_picks_are_those_of_the_torch_path(kernels, bits):
    """Also for counts beyond 32 bits, one bin and none; for ranks 0, 1 and above."""
    many = torch.randint(0, 2**40, (1 << bits,))
    sparse = torch.where(torch.arange(1 << bits) % 97 == 1, many, 0)
    one = torch.zeros_like(many)
    one[-1] = 7
    for seed, counts in enumerate((many, sparse, one, torch.zeros_like(many))):
        kernels.schedule(seed, False)
        prefix, n = torch.tensor(5), counts.sum()
        for remaining in (None, n, n // 2, (n > 0).long()):
            for share in FRACTIONS if remaining is None else FRACTIONS[:1]:
                arguments = (counts, counts // 3, prefix, remaining, share, 28 - bits)
                got, want = kernels.radix_pick(*arguments), selection.radix_pick(*arguments)
                for x, y in zip(got, want, strict=True):
                    assert_same_bits(x, y)


@pytest.mark.parametrize(
    ("kind", "threshold"),
    [("zeros", 0.0), ("zeros", -0.0), ("tied", 1.0), ("broken", INF), ("broken", NAN)],
)
def test_any_threshold_and_quota(kernels, kind, threshold):
    values, masks = values_of(kind, 3 * ROUND + 5, "cpu"), masks_of(3 * ROUND + 5, "cpu")
    for seed, quota in enumerate((-5, 0, 1, 3000, 5000, 2**32)):
        kernels.schedule(seed, seed == 3)
        arguments = (values, masks[seed % 2], torch.tensor(threshold), torch.tensor(quota))
        want = selection.select_largest(*arguments)
        assert torch.equal(kernels.select_largest(*arguments), want)


@pytest.mark.parametrize(("sizes", "options"), [(ALL, []), ((*ROUNDS, "0"), FEW_THREADS)])
def test_sorted_by_a_program(tmp_path, sizes, options):
    done = host.run(host.build(tmp_path, PROGRAM, options=options), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("sanitizer", "sizes", "seeds"),
    [("thread", MANY, "1"), ("thread", ONE_BLOCK, "023"), ("address", MANY, "01")],
)
def test_sanitizers_find_nothing(folder, sanitizer, sizes, seeds):
    program = host.build(folder / sanitizer, PROGRAM, sanitizer=sanitizer, options=FEW_THREADS)
    assert host.failure(program, *sizes, *seeds) == ""


@pytest.mark.parametrize(
    ("sanitizer", "sizes", "mutant"),
    [(how, sizes, host.Mutant(name, *edit)) for name, how, sizes, *edit in MUTANTS],
    ids=[name for name, *_ in MUTANTS],
)
def test_mutants_fail(tmp_path, sanitizer, sizes, mutant):
    options = FEW_THREADS if sanitizer else [*FEW_THREADS, "-O0"]
    program = host.build(tmp_path, PROGRAM, sanitizer=sanitizer, mutant=mutant, options=options)
    found = host.failure(program, *sizes, "1")
    assert found == "sanitizer" if sanitizer == "thread" else found
