"""The forward of sm_100 on the host: rows of whole grids, and the tensor memory of a thread."""

import pytest

from tests.cuda import host
from tests.cuda.host import Mutant

ROWS = host.HERE / "forward_sm100_host.cpp"
SCHEDULER = host.HERE / "scheduler_host.cpp"
CHUNKS = host.HERE / "row_chunks_host.cpp"
UNROLLED = ("-Wno-unknown-pragmas",)
MUTANTS = (
    Mutant("columns past V are summed", "row_tile.h", "j < columns ? z[j] : -INFINITY", "z[j]"),
    Mutant(
        "only the last chunk counts",
        "row_tile.h",
        "merged<kStatistics>(sums_, sums_of(z), scale_)",
        "sums_of(z)",
    ),
    Mutant("one maximum of four is lost", "row_tile.h", "larger(top[2], top[3])", "top[2]"),
    Mutant("rows past the number", "row_tile.h", "{nullptr, out.number,", "{nullptr, &head.rows,"),
    Mutant("a bias of other columns", "row_tile.h", "(head_.bias, first + j)", "(head_.bias, j)"),
    Mutant("the bias is capped alone", "row_tile.h", "capped(z[j],", "capped(0.0f * z[j],"),
    Mutant("the target of another chunk", "row_tile.h", "target_ - first", "target_ - start_"),
    Mutant("a target past V", "row_tile.h", "target < head.vocabulary ? target : -1", "target"),
    Mutant(
        "logits in the order of rows",
        "row_tile.h",
        "int64_t(out_.index[row_])",
        "int64_t(row_ + (1 << 26))",
    ),
    Mutant("kept logits past V", "row_tile.h", "if (j < columns) to", "to"),
    Mutant("one temperature for all", "row_tile.h", "head.stride_temperature, row)", "0, row)"),
)
# Values alone do not show them on the host.
UNSEEN = (
    (Mutant("four at any address", "row_tile.h", "% sizeof(float4)", "% 4"), "misaligned address"),
    (
        Mutant("rows in 32 bits", "row_tile.h", "int64_t(out_.index[row_])", "out_.index[row_]"),
        "overflow",
    ),
    (
        Mutant(
            "a bias past V",
            "row_tile.h",
            "j < columns ? bf16_at(head_.bias, first + j) : 0.0f",
            "bf16_at(head_.bias, first + j)",
        ),
        "heap-buffer-overflow",
    ),
    (
        Mutant("absent temperatures", "row_tile.h", "if (valid_) scale_", "scale_"),
        "heap-buffer-overflow",
    ),
)


@pytest.mark.parametrize("sanitizer", ["", "address"])
def test_rows_of_whole_grids_have_the_sums_of_fp64(tmp_path, sanitizer):
    program = host.build(tmp_path, [ROWS], sanitizer=sanitizer, options=UNROLLED)
    done = host.run(program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_row_fails(tmp_path, mutant):
    done = host.run(host.build(tmp_path, [ROWS], mutant=mutant, options=UNROLLED))
    assert done.returncode != 0
    assert "wanted" in done.stdout, done.stderr


@pytest.mark.parametrize(("mutant", "said"), UNSEEN, ids=lambda value: getattr(value, "name", ""))
def test_what_memory_does_not_have_is_seen(tmp_path, mutant, said):
    program = host.build(tmp_path, [ROWS], sanitizer="address", mutant=mutant, options=UNROLLED)
    assert said in host.run(program).stderr


def test_a_rank_that_is_added_twice_fails(tmp_path):
    mutant = Mutant("rank twice", "scheduler.h", "find(unit_, 0,", "find(unit_, blockIdx.x % 2,")
    options = "-fpermissive", "-DNDEBUG"
    program = host.build(tmp_path, [SCHEDULER], cute=True, mutant=mutant, options=options)
    assert "a pair has the same tiles" in host.run(program).stdout


def test_each_thread_reads_its_row_of_tensor_memory(tmp_path):
    done = host.run(host.build(tmp_path, [CHUNKS], cute=True))
    assert done.returncode == 0, done.stdout


def test_another_read_of_tensor_memory_fails(tmp_path):
    mutant = Mutant("two lanes", "row_chunks.h", "32dp32b64x", "16dp64b32x")
    done = host.run(host.build(tmp_path, [CHUNKS], cute=True, mutant=mutant))
    assert done.returncode != 0
    assert "wrong" in done.stdout
