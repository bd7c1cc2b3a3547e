"""The forward statistics of the head: formulas, the sums of a row, whole grids of its epilogue, and
the order of tiles, against fp64 and under sanitizers."""

import pytest

from . import host

FORMULAS, ORDER, SCHEDULER, CHECKS, GRIDS, SMALL = (
    host.HERE / f"{name}_host.cpp"
    for name in (
        "row_sums",
        "tile_order",
        "scheduler",
        "forward_checks",
        "forward",
        "forward_small",
    )
)
# CUTLASS's schedulers are made for nvcc, which takes more than g++, and for a GPU.
PERMISSIVE = ("-fpermissive", "-DNDEBUG")


def passes(program):
    done = host.run(program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", [FORMULAS, ORDER], ids=lambda path: path.stem)
def test_without_cute(tmp_path, source):
    passes(host.build(tmp_path, [source], sanitizer="address"))


def test_refusals(tmp_path):
    passes(host.build(tmp_path, [CHECKS], cute=True))


def test_scheduler(tmp_path):
    passes(host.build(tmp_path, [SCHEDULER], cute=True, options=PERMISSIVE))


def test_grids(tmp_path):
    passes(host.build(tmp_path, [GRIDS], cute=True, sanitizer="address"))


def test_no_race(tmp_path):
    passes(host.build(tmp_path, [SMALL], cute=True, sanitizer="thread"))


MUTANTS = {
    FORMULAS: [
        host.Mutant(
            "u not moved",
            "row_sums.h",
            "a * (sums.u + total * shift);",
            "a * sums.u;",
        ),
        host.Mutant(
            "ties not reset where a larger maximum comes",
            "row_sums.h",
            "to.n = stays ? sums.n : 0.0f;",
            "to.n = sums.n;",
        ),
        host.Mutant(
            "the old maximum's ties forgotten",
            "row_sums.h",
            "stays ? sums.s : a * total",
            "stays ? sums.s : a * sums.s",
        ),
        host.Mutant(
            "the exponent not clamped",
            "row_sums.h",
            "float const near = larger(kLowestExponent, d);",
            "float const near = d;",
        ),
        host.Mutant(
            "ties in the sum of the others",
            "row_sums.h",
            "  if (tie)\n    sums.n += 1.0f;\n  else\n    sums.s += e;",
            "  if (tie) sums.n += 1.0f;\n  sums.s += e;",
        ),
        host.Mutant(
            "w without its mixed term",
            "row_sums.h",
            "shift * (2.0f * sums.u + total * shift)",
            "shift * total * shift",
        ),
        host.Mutant(
            "ties in the squares of the others",
            "row_sums.h",
            "float const square = tie ? 0.0f : e * e;",
            "float const square = e * e;",
        ),
        host.Mutant(
            "fields stored a row apart",
            "row_sums.h",
            "  out[field] = sums.n;",
            "  out[rows] = sums.n;",
        ),
        host.Mutant(
            "tanh without its polynomial near 0",
            "logits.h",
            "return y > 0.6f ?",
            "return y > 0.0f ?",
        ),
        host.Mutant(
            "log1p without its repair",
            "logits.h",
            "logf(y) * (x / (y - 1.0f))",
            "logf(y)",
        ),
        host.Mutant(
            "expm1 as a difference near 0",
            "logits.h",
            "return x > -0.5f ?",
            "return x > 0.0f ?",
        ),
        host.Mutant(
            "a temperature without its stride",
            "logits.h",
            "temperature[row * stride]",
            "temperature[row]",
        ),
        host.Mutant(
            "strides in 32 bits", "logits.h", "int64_t stride, int row)", "int stride, int row)"
        ),
        host.Mutant(
            "rows in 32 bits", "row_sums.h", "int64_t(split) * rows + row", "split * rows + row"
        ),
        host.Mutant(
            "fields in 32 bits",
            "row_sums.h",
            "  int64_t const field = int64_t(splits) * rows;\n  out[0]",
            "  int const field = splits * rows;\n  out[0]",
        ),
    ],
    ORDER: [
        host.Mutant(
            "the last group as large as the others",
            "tile_order.h",
            "left < int(group) ? left : int(group)",
            "int(group)",
        ),
        host.Mutant(
            "the last cluster forgotten",
            "tile_order.h",
            "(blocks + cluster - 1) / cluster",
            "blocks / cluster",
        ),
        host.Mutant(
            "more rows than there is room for",
            "tile_order.h",
            "*number < rows ? *number : rows",
            "*number",
        ),
        host.Mutant(
            "a block of rows that are read taken",
            "tile_order.h",
            "(*range.first + block_rows - 1) / block_rows",
            "*range.first / block_rows",
        ),
    ],
    SCHEDULER: [
        host.Mutant(
            "warpgroups that take the same tiles",
            "scheduler.h",
            "unit_ += int64_t(step_) * count;",
            "unit_ += step_;",
        ),
        host.Mutant(
            "a cluster's blocks with the same rows",
            "scheduler.h",
            "int(blockIdx.x % kCluster)",
            "0",
        ),
    ],
    SMALL: [
        host.Mutant(
            "the bias of another column",
            "forward_tile.h",
            "bf16_at(head.bias, v)",
            "bf16_at(head.bias, v - start_v)",
        ),
        host.Mutant(
            "logits kept at the row's place and not its number",
            "forward_tile.h",
            "int64_t(out.index[t])",
            "int64_t(t + (1 << 26))",
        ),
        host.Mutant(
            "columns past the vocabulary not masked",
            "forward_tile.h",
            "if (start_v + width > head.vocabulary) {",
            "if (start_v + width > head.vocabulary + 256) {",
        ),
        host.Mutant(
            "the last column masked",
            "forward_tile.h",
            "c(i, j)) >= head.vocabulary) z",
            "c(i, j)) + 1 >= head.vocabulary) z",
        ),
        host.Mutant(
            "a target past the vocabulary stored",
            "forward_tile.h",
            "target >= width || out.target[t] >= head.vocabulary",
            "target >= width",
        ),
        host.Mutant(
            "absent rows stored",
            "forward_tile.h",
            "if (thread < cute::size<0>(tile) && t < end)",
            "if (thread < cute::size<0>(tile) && t < head.rows)",
        ),
        host.Mutant(
            "the maximum of half a quad",
            "forward_tile.h",
            "lane *= 2)\n      sums.m",
            "lane *= 4)\n      sums.m",
        ),
        host.Mutant(
            "a warp of a row forgotten",
            "forward_tile.h",
            "for (int warp = 1; warp < kWarps; ++warp)",
            "for (int warp = 2; warp < kWarps; ++warp)",
        ),
    ],
}
# What values alone do not show.
UNSEEN = {
    "thread": [
        host.Mutant(
            "no barrier after the main loop",
            "forward_tile.h",
            "if constexpr (kWarps > 1) __syncthreads();",
            "if constexpr (kWarps > 1) {}",
        ),
        host.Mutant(
            "no barrier before sums are merged",
            "forward_tile.h",
            "      __syncthreads();\n      int const t = start_t + thread;",
            "      int const t = start_t + thread;",
        ),
    ],
    "address": [
        host.Mutant(
            "rows of logits in 32 bits", "forward_tile.h", "int64_t(out.index[t])", "out.index[t]"
        ),
        host.Mutant(
            "a bias past V",
            "forward_tile.h",
            "v < head.vocabulary ? bf16_at(head.bias, v) : 0.0f",
            "bf16_at(head.bias, v)",
        ),
        host.Mutant(
            "temperatures of absent rows", "forward_tile.h", "(inside ? inverse", "(true ? inverse"
        ),
    ],
}


@pytest.mark.parametrize(
    ("source", "mutant"),
    [(source, mutant) for source, mutants in MUTANTS.items() for mutant in mutants],
    ids=lambda value: getattr(value, "name", ""),
)
def test_mutants(tmp_path, source, mutant):
    options = PERMISSIVE if source == SCHEDULER else ()
    cute = source in (SCHEDULER, SMALL)
    assert host.failure(host.build(tmp_path, [source], cute=cute, mutant=mutant, options=options))


@pytest.mark.parametrize(
    ("sanitizer", "mutant"),
    [(sanitizer, mutant) for sanitizer, mutants in UNSEEN.items() for mutant in mutants],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_values_do_not_show(tmp_path, sanitizer, mutant):
    program = host.build(tmp_path, [SMALL], cute=True, sanitizer=sanitizer, mutant=mutant)
    assert host.failure(program) == "sanitizer"
