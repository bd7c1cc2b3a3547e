"""No kernel reads or writes outside of its arguments, and no two programs race, as GPUs run them.

The interpreter runs programs one after another: a race shows by who touched a byte, not by a value.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from entropy_kernels import _triton, device
from entropy_kernels.verification.logit_cases import entropy_cases
from entropy_kernels.verification.offset_cases import offset_cases
from entropy_kernels.verification.pair_cases import support_cases
from entropy_kernels.verification.token_cases import ratio_loss_cases, selection_cases
from tests.interpreter_sanitizer import kernels_of, sanitized
from tests.marks import nan_is_meant
from tests.test_triton_kernel_cases import DEVICE, PAIRS, every_head_case, small_blocks

pytestmark = [
    nan_is_meant,
    pytest.mark.skipif(not device.interpreting(), reason="it needs Triton's interpreter"),
]
small_blocks = small_blocks
# Kernels and branches, not numbers: other values take the same addresses.
HEADS = ("all options", "one more", "one temperature", "strided", "statistics", "stored rows")
TOKENS = ("(1, 65)", "(3, 7)", "(2, 130)", "tied N=2100", "broken N=128", "N=0", "N=1")


def cases():
    heads = [(case.id, case.values[0]) for case in every_head_case()]
    tokens = ratio_loss_cases("triton", DEVICE, small=True)
    tokens += selection_cases("triton", DEVICE, small=True)
    for chosen, names in ((HEADS, heads), (TOKENS, tokens)):
        assert all(any(x in name for name, *_ in names) for x in chosen), "no such case"
    yield from ((name, run) for name, run in heads if any(x in name for x in HEADS))
    yield from (case[:2] for case in tokens if any(x in case.name for x in TOKENS))
    yield from (x[:2] for x in offset_cases(PAIRS[0], torch.float32, DEVICE, small=True))
    yield from (x[:2] for x in support_cases(torch.float32, DEVICE, small=True, quick=True))
    yield from (x[:2] for x in entropy_cases(torch.float32, DEVICE, quick=True))


@pytest.mark.slow
def test_no_kernel_reads_or_writes_what_it_must_not():
    launched = Counter()
    for name, run in cases():
        try:
            with sanitized() as launches:
                run()
        except InterpreterError as error:
            raise AssertionError(name) from error
        launched += launches
    assert launched.keys() == kernels_of(Path(_triton.__file__).parent)


@triton.jit
def shift_kernel(x_ptr, out_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[i + SHIFT], a block per program."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + SHIFT, mask=offs < n, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def columns_kernel(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    """The first column of x."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < n, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def count_kernel(out_ptr, ATOMIC: tl.constexpr):
    """One, or a count of the programs."""
    if ATOMIC:
        tl.atomic_add(out_ptr, 1.0)
    else:
        tl.store(out_ptr, 1.0)


@triton.jit
def mixed_kernel(out_ptr, FIRST: tl.constexpr):
    """Program FIRST stores what the other one adds to."""
    if tl.program_id(0) == FIRST:
        tl.store(out_ptr, 0.0)
    else:
        tl.atomic_add(out_ptr, 1.0)


@triton.jit
def lanes_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Two lanes each store to one address."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs // 2, tl.load(x_ptr + offs))


@triton.jit
def own_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Reverses by way of global memory, without a barrier."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))
    tl.store(x_ptr + offs, tl.load(out_ptr + BLOCK - 1 - offs))


@triton.jit
def descriptor_kernel(x_desc, out_desc, BLOCK: tl.constexpr):
    """Copies a block of rows per program."""
    row = tl.program_id(0) * BLOCK
    out_desc.store([row, 0], x_desc.load([row, 0]))


def shift(x: torch.Tensor, out: torch.Tensor, by: int = 0) -> torch.Tensor:
    n = out.numel()
    shift_kernel[(triton.cdiv(n, 16),)](x, out, n, SHIFT=by, BLOCK=16)
    return out


def columns(x: torch.Tensor, stride: int):
    columns_kernel[(1,)](x, torch.zeros(8), stride, len(x), BLOCK=8)


def copy(rows: int, step: int = 16):
    x, out = torch.randn(32, 16), torch.zeros(32, 16)
    given = TensorDescriptor(x, [rows, 16], [16, 1], [16, 16])
    taken = TensorDescriptor.from_tensor(out, [16, 16])
    descriptor_kernel[(triton.cdiv(rows, step),)](given, taken, BLOCK=step)
    return x, out


LINE = torch.arange(80.0)
WRONG = {
    "a store past the end": (
        lambda: shift_kernel[(5,)](LINE, torch.zeros(64), 80, SHIFT=0, BLOCK=16),
        "shift_kernel: a store outside of an argument's 256 bytes",
    ),
    "a load before the start": (
        lambda: shift(LINE, torch.zeros(64), -1),
        "shift_kernel: a load outside of an argument's 320 bytes",
    ),
    "a load past a view": (
        lambda: shift(LINE[:64], torch.zeros(64), 1),
        "shift_kernel: a load outside of an argument's view",
    ),
    "a load between the columns of a view": (
        lambda: columns(torch.randn(8, 6)[:, ::3], 4),
        "columns_kernel: a load outside of an argument's view",
    ),
    "a load of no argument": (
        lambda: shift(LINE, torch.zeros(64), 1 << 24),
        "shift_kernel: a load in no argument, or in several",
    ),
    "two programs store": (
        lambda: count_kernel[(2,)](torch.zeros(1), ATOMIC=False),
        "count_kernel: a store where another program has a store",
    ),
    "a load after another program's store": (
        lambda: shift(line := LINE.clone(), line[16:]),
        "shift_kernel: a load where another program has a store",
    ),
    "a store after another program's load": (
        lambda: shift(line := LINE.clone(), line[:64], 16),
        "shift_kernel: a store where another program has a load",
    ),
    "an atomic after another program's store": (
        lambda: mixed_kernel[(2,)](torch.zeros(1), FIRST=0),
        "mixed_kernel: a atomic where another program has a store",
    ),
    "a store after another program's atomic": (
        lambda: mixed_kernel[(2,)](torch.zeros(1), FIRST=1),
        "mixed_kernel: a store where another program has a atomic",
    ),
    "two lanes store": (
        lambda: lanes_kernel[(1,)](torch.arange(16.0), torch.zeros(8), BLOCK=16),
        "lanes_kernel: a store of different values to one address",
    ),
    "a load of an own store": (
        lambda: own_kernel[(1,)](torch.arange(16.0), torch.zeros(16), BLOCK=16),
        "own_kernel: a load of what the program itself has stored",
    ),
    "a descriptor of more rows than there are": (
        lambda: copy(48),
        "descriptor_kernel: a load outside of an argument's 2048 bytes",
    ),
    "descriptors of rows that overlap": (
        lambda: copy(32, 8),
        "descriptor_kernel: a store where another program has a store",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_is_named_with_its_fault(name):
    run, message = WRONG[name]
    with sanitized(), pytest.raises(InterpreterError, match=message):
        run()


def test_kernels_that_are_right_compute_what_they_do_without():
    with sanitized() as launches:
        assert torch.equal(shift(LINE, torch.zeros(64), 16), LINE[16:])
        assert torch.equal(shift(line := LINE.clone(), line), LINE)
        x, out = copy(32)
        assert torch.equal(x, out)
        columns(torch.randn(8, 6)[:, ::3], 6)
        count = torch.zeros(1)
        count_kernel[(3,)](count, ATOMIC=True)
        assert count == 3
        lanes_kernel[(1,)](torch.full((16,), torch.nan), torch.zeros(8), BLOCK=16)
    assert launches["shift_kernel"] == 2
