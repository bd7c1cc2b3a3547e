"""`python -m entropy_kernels --verify`: every kernel of this machine, a table, a status, a cost."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import __main__ as main
from tests.marks import nan_is_meant

pytest.importorskip("triton")

from entropy_kernels import device
from entropy_kernels._triton.common import tiles
from entropy_kernels.verification import checks, command, first_use
from entropy_kernels.verification.cost import COMPILE_SECONDS, Cost
from entropy_kernels.verification.question import Question, ask

CPU = torch.device("cpu")
pytestmark = [nan_is_meant, pytest.mark.skipif(torch.cuda.is_available(), reason="interprets")]


@pytest.fixture(autouse=True)
def record(monkeypatch, tmp_path):
    monkeypatch.setenv("EK_CACHE_DIR", str(tmp_path))
    first_use.forget()
    yield
    first_use.forget()


@pytest.fixture
def wrong(monkeypatch):
    """Every kernel is right, unless this names it."""
    found = {}

    def check(question, where, sizes, forward, thorough):
        return next((why for name, why in found.items() if name in question.text), None)

    monkeypatch.setattr(command, "check", check)
    monkeypatch.setattr(command, "_offsets", lambda where: iter(()))
    monkeypatch.setattr(main, "mend_interpreter", lambda: None)
    return found


def test_a_table_says_what_is_right_and_the_record_keeps_it(wrong, capsys):
    assert main.main(["--verify"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert all(row.endswith("  ok") for row in rows)
    assert last.startswith(f"{len(rows)} rows in ")
    assert len(first_use.known(CPU)) == len(rows)
    first_use.forget()
    assert all(answer.right for answer in first_use.known(CPU).values())


def test_a_wrong_kernel_is_a_status_and_a_reason(wrong, capsys):
    wrong["forward float32 tma "] = "off by 1"
    assert main.main(["--verify", "--json"]) == 1
    [found] = json.loads(capsys.readouterr().out)
    failed = [row for row in found["rows"] if row["right"] is False]
    assert [row["reason"] for row in failed] == ["off by 1"]
    assert found["wrong"] == 1
    assert found["machine"]["architecture"] == "interpreter"
    assert not first_use.known(CPU)[failed[0]["question"]].right


def test_a_cache_that_cannot_be_written_keeps_nothing(wrong, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EK_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="does not keep the checks"):
        assert main.main(["--verify"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert "; not all are kept: " in last
    assert "kept in" not in last


def test_json_goes_into_a_file_where_one_is_named(wrong, capsys, tmp_path):
    assert main.main(["--verify", "--json", str(tmp_path / "answers.json")]) == 0
    assert "rows in" in capsys.readouterr().out
    [found] = json.loads((tmp_path / "answers.json").read_text())
    assert {row["question"] for row in found["rows"]} == set(first_use.known(CPU))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--verify --bench", "--verify: it takes --json alone beside it; got --bench"),
        ("--verify --rounds 3 --device cpu --json", "alone beside it; got --device, --rounds"),
        ("--json", "--json: it needs --bench or --verify"),
        ("--rounds 3", "--rounds: it needs --bench"),
    ],
)
def test_options_that_do_not_fit_are_refused(wrong, capsys, arguments, told):
    with pytest.raises(SystemExit):
        main.main(arguments.split())
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--verify"], [], ["--bench"]])
def test_a_bad_variable_is_told(wrong, monkeypatch, capsys, arguments):
    monkeypatch.setenv("EK_VERIFY", "yes")
    with pytest.raises(SystemExit):
        main.main(arguments)
    assert "EK_VERIFY must be one of on, off, force; got 'yes'" in capsys.readouterr().err
    monkeypatch.setenv("EK_VERIFY", "")
    monkeypatch.setenv("EK_PERSISTENT", "yes")
    with pytest.raises(SystemExit):
        main.main(arguments)
    assert "EK_PERSISTENT must be on or off; got 'yes'" in capsys.readouterr().err


def test_an_empty_variable_is_unset(monkeypatch):
    for name in ("EK_VERIFY", "EK_PERSISTENT"):
        monkeypatch.setenv(name, "")
    assert first_use.mode() == "on"
    assert device.programs(1000, CPU) == device.processors(CPU)


def test_bench_wants_a_file(capsys):
    with pytest.raises(SystemExit):
        main.main(["--bench", "--json"])
    assert "--json: it needs a FILE" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_every_tile_of_a_gpu_is_asked_about(monkeypatch, arch):
    monkeypatch.setattr(device, "architecture", lambda where: arch)
    monkeypatch.setattr(device, "interpreting", lambda: False)
    asked = {x.question for x in command.questions(CPU)}
    usable = tiles.variants(arch)
    for key, row in tiles.TILES.items():
        op, *endings = key.op.split("_")
        if key.architecture != arch:
            continue
        names = {"store": "stored", "keep": "keep_logits"}
        flags = {names.get(x, x) for x in endings}
        # Only chunks of cuBLAS's products store some rows, and no descriptor's kernel keeps all.
        has = usable & {"cublas"} if "stored" in flags else usable
        has = has - {*tiles.TMA} if "keep_logits" in flags else has
        for tile in row:
            found = any((x.op, x.tile) == (op, tile) and flags <= {*x.flags} for x in asked)
            assert found or tile.variant not in has, (key, tile)


def test_offsets_beyond_32_bits_are_read_in_the_interpreter():
    [row, *others] = command._offsets(CPU)
    assert [x["reason"] for x in (row, *others) if not x["right"]] == []
    assert {"rows of hidden", "rows of weight"} <= {
        " ".join(x["question"].split()[1:4]) for x in (row, *others)
    }


def test_a_full_memory_is_no_answer(monkeypatch, wrong):
    def full(*args, **options):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(command, "check", full)
    assert main.main(["--verify"]) == 0
    assert first_use.known(CPU) == {}


def test_the_cost_of_a_first_call_is_counted():
    """The kernels of a plain forward: what a user's first call without gradients compiles."""
    arch = device.architecture(CPU)
    tile = tiles.row("forward", arch, torch.float32, 32, 1, tiles.variants(arch))[0]
    with Cost() as cost:
        assert (
            checks.check(ask("forward", torch.float32, 32, (), tile), CPU, checks.Sizes(32)) is None
        )
    # Four kinds of rows, rows without an answer, and one twice. Two launches number the valid rows;
    # the others sum, take the targets' logits, merge and spread.
    assert cost.launches == 7 * 6
    assert len(cost.kernels) == 6
    assert 0 < cost.bytes < 1 << 24
    assert cost.calls > cost.launches
    assert 6 * 0.75 < cost.predicted_seconds < 6 * 0.75 + 1
    with Cost() as again:
        torch.zeros(1000).add(1)
    assert (again.launches, again.bytes) == (0, 8000)


def test_a_first_use_costs_little_beyond_what_its_call_compiles():
    """By the counts; a call with a gradient of log-prob alone."""
    arch, tokens, vocabulary = device.architecture(CPU), 40, 208
    usable = tiles.variants(arch)
    forward, dlogits = (
        tiles.row(op, arch, torch.float32, 32, 1, usable)[0] for op in ("forward", "dlogits")
    )
    sizes = checks.Sizes(32, tokens, vocabulary)
    h, w = (torch.randn(n, 32, requires_grad=True) for n in (tokens, vocabulary))
    with Cost() as call:
        head = ek.Head(h, w, torch.zeros(tokens, dtype=torch.int64))
        ek.linear_logprob_entropy(head, impl="triton").logprob.sum().backward()
    with Cost() as cost:
        for op, tile in (("forward", forward), ("dlogits", dlogits)):
            assert checks.check(ask(op, torch.float32, 32, (), tile), CPU, sizes, forward) is None
    extra = cost.kernels - call.kernels
    assert call.kernels <= cost.kernels
    # Where entropy has a gradient, too.
    names = sorted(name for name, *_ in extra)
    assert names == 2 * ["active_rows_kernel"] + ["dlogits_pointer_kernel", "gather_kernel"]
    assert cost.calls < 10_000
    assert cost.predicted_seconds - COMPILE_SECONDS * len(call.kernels) < 5


def test_an_operation_is_a_question():
    assert checks.check(Question("ratio_loss", torch.float32), CPU) is None


@pytest.mark.slow
def test_the_interpreter_checks_in_a_few_times_of_a_first_look():
    """Seconds of one processor, which others do not share, beside those of the short self-check."""

    def seconds(*options):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [sys.executable, "-m", "entropy_kernels", *options]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    # Ten times as long, on the processors it was tried on.
    assert seconds("--verify") < 20 * seconds()


@pytest.mark.parametrize("arch", ["gfx942", "sm_80"])
def test_only_nvidias_compiler_is_given_a_bound_of_registers(arch):
    found = tiles.row("forward", arch, torch.float32, 4096, 8192, {"cublas"})
    assert all(("maxnreg" in tile.options) == arch.startswith("sm_") for tile in found)
