"""The kernel of sm_80 around CUTLASS's main loop: tails of rows, columns and depth, on the host."""

import pytest

from . import host

PRODUCT = host.HERE / "product_sm80_host.cpp"
# CUTLASS's main loop is made for nvcc, which takes more than g++.
PERMISSIVE = ("-fpermissive", "-DNDEBUG")
MUTANTS = [
    host.Mutant(name, "product_sm80.h", old, new)
    for name, old, new in (
        ("depth rounded up", "head.depth - size<1>(tiles_a) * size<2>(tiles_a)", "0"),
        ("columns past the end", "columns - split * size<1>(tile)", "128"),
        ("another chunk's weight", " + start * head.stride_weight", ""),
    )
]


def test_products_of_whole_grids_are_exact(tmp_path):
    done = host.run(host.build(tmp_path, [PRODUCT], cute=True, options=PERMISSIVE))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_kernels_are_refused(tmp_path, mutant):
    program = host.build(tmp_path, [PRODUCT], cute=True, mutant=mutant, options=PERMISSIVE)
    assert host.failure(program)
