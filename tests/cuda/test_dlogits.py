"""dz of csrc/cuda on the host: whole grids against fp64, sanitized, and broken on purpose."""

import pytest

from tests.cuda import host
from tests.cuda.host import Mutant

SOURCE = host.HERE / "dlogits_host.cpp"
CHECKS = host.HERE / "dlogits_checks_host.cpp"
TEXT = "dlogits_tile.h"
MUTANTS = (
    Mutant(
        "a warp's columns apart",
        "tiled_mma.h",
        "_1, cute::_32, cute::_8",
        "_1, cute::_8, cute::_16",
    ),
    Mutant("half an exchange", TEXT, "bit < 4; bit *= 2", "bit < 2; bit *= 2"),
    Mutant(
        "lanes send what they keep",
        TEXT,
        "upper ? word[a] : word[a + bit];",
        "upper ? word[a + bit] : word[a];",
    ),
    Mutant("a target like others", TEXT, "own == k ? row[h].at_target : dz[h][k]", "dz[h][k]"),
    Mutant(
        "1 - p by subtraction",
        TEXT,
        "g_logprob * expm1(logp)",
        "g_logprob * (exp2_approx(logp * kLog2e) - 1.0f)",
    ),
    Mutant("no slope", TEXT, "dz[h][k] = slope(logit) *", "dz[h][k] = 1.0f *"),
    Mutant("no slope at the target", TEXT, "at_target = slope(logit) *", "at_target = 1.0f *"),
    Mutant(
        "a bias summed after rounding",
        TEXT,
        "(row[0].inside ? dz[0][k] : 0.0f)",
        "(row[0].inside ? float(cute::bfloat16_t(dz[0][k])) : 0.0f)",
    ),
    Mutant("a sum of other lanes", TEXT, "sent, 4 * half", "sent, 2 * half"),
    Mutant("a sum of rows past the end", TEXT, "(row[1].inside ? dz[1][k] : 0.0f)", "dz[1][k]"),
    Mutant("a partial without rows", TEXT, "if (first >= end) continue;", ""),
    Mutant("a partial past the chunk", TEXT, "if (column >= start_column + columns) return;", ""),
    Mutant("rows past the end", TEXT, "if (row[h].inside) store", "store"),
    Mutant("columns past the chunk", TEXT, "if (count >= kStored) {", "if (true) {"),
    Mutant("one column past the chunk", TEXT, "k < count; ++k", "k <= count; ++k"),
    Mutant(
        "pairs in the other order",
        TEXT,
        "(dz[h][2 * a], dz[h][2 * a + 1])",
        "(dz[h][2 * a + 1], dz[h][2 * a])",
    ),
    Mutant("an infinite log p", TEXT, "x < low ? low : x", "x"),
    Mutant("a lost NaN", TEXT, "x > 0.0f ? 0.0f :", "!(x < 0.0f) ? 0.0f :"),
    Mutant("another row's fields", TEXT, "load(2 * m + 1, at + 8)", "load(2 * m + 1, at)"),
    Mutant("rows of dz in 32 bits", TEXT, "(at + 8 * h) * out", "(at + 8 * h) * (int)out"),
    Mutant(
        "rows of partials in 32 bits",
        TEXT,
        "* out.stride_dz + column]",
        "* (int)out.stride_dz + column]",
    ),
    Mutant(
        "a gradient that is not given",
        TEXT,
        "out.has_entropy ? field[4 * next] : 0.0f",
        "field[4 * next]",
    ),
    Mutant("half of a tail", TEXT, "    high >>= 16;\n", ""),
    Mutant(
        "rows that are read",
        "tile_order.h",
        "(*range.first + block_rows - 1) / block_rows",
        "*range.first / block_rows",
    ),
    Mutant("a bias of another chunk", TEXT, "int64_t(out.start) + start", "start"),
)


@pytest.mark.parametrize("sanitizer", host.SANITIZERS)
def test_whole_grids_have_the_gradient_of_fp64(tmp_path, sanitizer):
    program = host.build(tmp_path, [SOURCE], cute=True, sanitizer=sanitizer)
    done = host.run(program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_no_kernel_can_write_is_refused(tmp_path):
    done = host.run(host.build(tmp_path, [CHECKS], cute=True))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_kernel_has_wrong_values(tmp_path, mutant):
    options = [] if mutant.file == "tiled_mma.h" else ["-DEK_ONE_TILE"]
    program = host.build(tmp_path, [SOURCE], cute=True, mutant=mutant, options=options)
    assert host.failure(program) == "value"
