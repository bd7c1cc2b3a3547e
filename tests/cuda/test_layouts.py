"""Which thread holds what of a tile of logits: proved for every thread of every compiled tile."""

import pytest

from . import host

PROGRAM = host.HERE / "layouts_host.cpp"
MUTANTS = [
    host.Mutant(
        "the columns of a pair apart",
        "fragment.h",
        "make_layout(get<0, 0>(l), get<0, 2>(l), get<2>(l))",
        "make_layout(get<0, 2>(l), get<0, 0>(l), get<2>(l))",
    ),
    host.Mutant(
        "the wrong warp of a row",
        "fragment.h",
        "cute::get<2>(mma.get_thr_layout_vmnk().get_flat_coord(thread))",
        "cute::get<1>(mma.get_thr_layout_vmnk().get_flat_coord(thread))",
    ),
]


def test_layouts(tmp_path):
    done = host.run(host.build(tmp_path, [PROGRAM], cute=True))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants(tmp_path, mutant):
    assert host.failure(host.build(tmp_path, [PROGRAM], cute=True, mutant=mutant))
