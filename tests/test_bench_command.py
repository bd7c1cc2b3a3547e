"""python -m entropy_kernels --bench: it checks before it times, and says what it could not do."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from entropy_kernels import __main__ as main
from entropy_kernels import _extensions, _native
from entropy_kernels._bench import command, machine, measure, rounds, step

ROOT = Path(__file__).parents[1]
PROC = "/proc/version"
UNWRITABLE = [(["--json", PROC], f"must be writable; got {PROC}: ")] if Path(PROC).exists() else []
CPU = torch.device("cpu")
TINY = ["--bench", "--shape", "48", "16", "300", "--rounds", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """It takes longer than all the rest."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    compiler = step._compiler
    compiler.cache_clear()
    yield
    compiler.cache_clear()


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of the table's rows, by label; a line that says why has none."""
    found = {}
    for line in printed.splitlines():
        label, *cells = re.split(r" {2,}", line)
        if len(cells) == 4 and label:
            found[label] = cells
    return found


def wrong(entrant, calls):
    def run(problem):
        calls.append(0)
        found = entrant.run(problem)
        return found | {"dweight": found["dweight"] * 1.01}

    return dataclasses.replace(entrant, run=run)


def test_the_table_and_the_file_say_the_same(capsys, tmp_path):
    threads = torch.get_num_threads()
    file = tmp_path / "result.json"
    assert main.main([*TINY, "--json", str(file), "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.isascii()
    result = json.loads(file.read_text())
    impl = result["impl"]
    labels = {entry["label"] for entry in result["contestants"] if "wall_s" in entry}
    assert labels >= {
        "eager: all logits",
        f"ours ({impl}), 100% of the tokens",
        f"ours ({impl}), 20% of the tokens",
        f"ours ({impl}), 20% of the tokens, known beforehand",
    }
    found = rows(printed)
    assert set(found) == labels
    assert found["eager: all logits"][1] == "1.00"
    for entry in result["contestants"]:
        if "wall_s" in entry:
            milliseconds = 1e3 * sorted(entry["wall_s"])[1]
            assert float(found[entry["label"]][0]) == pytest.approx(milliseconds, abs=0.051)
            results = {"loss", "dhidden", "dweight", "logprob", "entropy"}
            less = {"entropy"} if "no entropies" in entry["label"] else set()
            assert set(entry["errors"]) == results - less
            assert ("entropies" in entry["computes"]) is not (
                bool(less) or entry["name"].endswith("-known")
            )
            assert entry["error"] < 1e-3
    here = machine.processor()
    assert result["processor"]["slug"] == here.slug
    assert result["threads"] == 1
    for text in (here.name, here.make, torch.__version__, machine.libraries(), "1 of "):
        assert text in printed
    if impl == "cpu":
        assert f"instruction set {_native.instruction_set(torch.float32)}" in printed


def test_what_torch_compile_cannot_do_is_one_line(capsys, monkeypatch):
    def fail():
        raise RuntimeError(
            "backend='inductor' raised:\nInvalidCxxCompiler: no g++\n\n Set TORCHDYN"
        )

    monkeypatch.setattr(step, "_compiler", fail)
    assert main.main(TINY) == 0
    printed = capsys.readouterr().out
    assert (
        "torch.compile of eager: not timed: RuntimeError: backend='inductor' raised: "
        "InvalidCxxCompiler:" in printed
    )
    assert "Traceback" not in printed


@pytest.mark.parametrize(("which", "status"), [("ours", 1), ("eager with", 0)])
def test_a_wrong_contestant_is_named_and_never_timed(which, status, capsys, monkeypatch, tmp_path):
    calls = []

    def entrants(*options):
        found = real(*options)
        place = next(i for i, x in enumerate(found) if x.label.startswith(which))
        return [*found[:place], wrong(found[place], calls), *found[place + 1 :]]

    real = command.entrants
    monkeypatch.setattr(command, "entrants", entrants)
    # Some processors make oneDNN's products wrong by themselves.
    monkeypatch.setattr(step, "products_by_onednn", nullcontext)
    file = tmp_path / "result.json"
    assert main.main([*TINY, "--json", str(file)]) == status
    printed = capsys.readouterr().out
    assert re.search(
        rf"^{which}.*: WRONG, not timed: dweight is off by 0\.01; 0\.001", printed, re.M
    )
    # Once small and once in full.
    assert len(calls) == 2
    (entry,) = [x for x in json.loads(file.read_text())["contestants"] if "WRONG" in str(x)]
    assert "wall_s" not in entry
    assert len(rows(printed)) >= 3


def test_wrong_entropies_of_ours_are_seen_although_the_loss_hides_them(capsys, monkeypatch):
    def forward(problem, impl):
        found = real(problem, impl=impl)
        return found | {"entropy": found["entropy"] * 1.01}

    real = measure.our_forward
    monkeypatch.setattr(measure, "our_forward", forward)
    assert main.main(TINY) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG, not timed: entropy is off by") == 3
    assert not any(label.startswith("ours") for label in rows(printed))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "0", "4", "5"], "--shape: must be a whole number of 1 or more; got 0"),
        (["--shape", "3", "-4", "5"], "--shape"),
        (["--shape", "3", "4.5", "5"], "--shape: must be a whole number of 1 or more; got 4.5"),
        (["--shape", "3", "4"], "--shape: expected 3 arguments"),
        (["--fraction", "0"], "--fraction: must be a number above 0 and at most 1; got 0"),
        (["--fraction", "2"], "--fraction: must be a number above 0 and at most 1; got 2"),
        (["--fraction", "nan"], "--fraction: must be a number above 0 and at most 1; got nan"),
        (["--fraction", "a fifth"], "at most 1; got a fifth"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "warp"], "--device: must be one of cpu"),
        (["--device", "cuda:99"], "; got cuda:99"),
        (["--rounds", "0"], "--rounds: must be a whole number of 1 or more; got 0"),
        (["--threads", "many"], "--threads: must be a whole number of 1 or more; got many"),
        (["--threads", "100000"], "the machine's; got 100000"),
        (["--json", "no/such/folder/file"], "--json: must be a file in a folder that is there"),
        (["--json", "/dev/null/file"], "--json: must be"),
        *UNWRITABLE,
        (["--shape", "8", "4096", "99999999999"], "GB are available on cpu"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_bad_option_says_what_came_and_what_was_wanted(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--bench", "--device", "cpu", *options])
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_to_come_is_not_left_where_nothing_is_measured(tmp_path):
    with pytest.raises(SystemExit):
        main.main(["--bench", "--json", str(tmp_path / "new"), "--rounds", "0"])
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(_native.cpu() is None, reason="without the kernels there is no choice")
@pytest.mark.parametrize("options", [[], ["--bench"]], ids=["report", "bench"])
def test_an_unknown_instruction_set_is_one_line(options, capsys, monkeypatch):
    monkeypatch.setenv("EK_CPU_ISA", "sse9")
    _native.instruction_set.cache_clear()
    with pytest.raises(SystemExit) as end:
        main.main(options)
    assert end.value.code == 2
    assert "error: EK_CPU_ISA must be one of" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_gets_no_traceback():
    command = [sys.executable, "-m", "entropy_kernels"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors
    assert process.returncode == 1


def test_its_options_need_bench(capsys):
    for option, value in (("--fraction", "0.5"), ("--rounds", "2")):
        with pytest.raises(SystemExit):
            main.main([option, value])
        assert f"{option}: it needs --bench" in capsys.readouterr().err


def test_logits_that_do_not_fit_are_left_out_and_ours_is_timed(capsys, monkeypatch):
    shape = (2000, 8, 1000)
    room = command.problem_bytes(shape, torch.float32) + 2 * command.logits_bytes(shape)
    monkeypatch.setattr(machine, "available_bytes", lambda device: room)
    assert main.main([*TINY, "--shape", *map(str, shape)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"eager: all logits: not timed: with all logits it needs about 0\.0\d GB", printed
    )
    assert "torch's linear_cross_entropy, no entropies: not timed: with all" in printed
    found = rows(printed)
    chunked = {"torch's linear_cross_entropy in chunks, no entropies", "TRL's kernels head"}
    ours = set(found) - chunked
    assert len(ours) == 3
    assert all(label.startswith("ours") for label in ours)
    assert all(cells[1] == "-" for cells in found.values())


def test_heads_that_are_not_here_are_named(capsys, monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    assert main.main(TINY) == 0
    printed = capsys.readouterr().out
    this = f"not timed: needs torch 2.13 or newer; this is torch {torch.__version__}"
    for name in ("", " in chunks"):
        assert f"torch's linear_cross_entropy{name}, no entropies: {this}" in " ".join(
            printed.split()
        )
    assert "TRL's kernels head: not timed: needs trl" in printed


def test_ctrl_c_ends_with_what_there_is(capsys, monkeypatch):
    def interrupted(*arguments):
        for number, found in enumerate(real(*arguments)):
            if number == 7:
                raise KeyboardInterrupt
            yield found

    real = rounds.alternate
    monkeypatch.setattr(measure, "alternate", interrupted)
    assert main.main(TINY) == command.STOPPED
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "stopped by Ctrl-C after 1 of 3 rounds"
    assert len(rows(printed)) >= 4

    def at_once(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "make_problem", at_once)
    assert main.main(TINY) == command.STOPPED
    assert capsys.readouterr().out.splitlines()[-1] == "stopped by Ctrl-C after 0 of 3 rounds"


def test_missing_kernels_are_named(capsys, monkeypatch):
    monkeypatch.setattr(_extensions, "load", lambda name: (None, "the kernels are not built"))
    assert main.main(TINY) == 0
    printed = capsys.readouterr().out
    assert 'torch, which impl="auto" takes here because the kernels are not built' in printed
    assert "ours (torch), 20% of the tokens" in rows(printed)


def test_a_backend_can_be_named(capsys, monkeypatch):
    assert main.main([*TINY, "--impl", "torch"]) == 0
    printed = capsys.readouterr().out
    assert "ours (torch), 20% of the tokens" in rows(printed)
    assert "takes here because" not in printed
    monkeypatch.setattr(_extensions, "load", lambda name: (None, "the kernels are not built"))
    with pytest.raises(SystemExit):
        main.main([*TINY, "--impl", "cpu"])
    said = capsys.readouterr().err
    assert 'argument --impl: impl="cpu" cannot run: the kernels are not built' in said


def test_a_fraction_of_one_has_no_row_twice(capsys):
    names = [entrant.name for entrant in command.entrants("torch", CPU, torch.float32, 1.0)]
    expected = "compile", "eager", "eager-onednn", "lce", "lce-chunked", "trl"
    assert set(names) == {*expected, "torch-1", "torch-1-known"}
    assert len(names) == len(set(names))
    assert main.main([*TINY, "--fraction", "1", "--dtype", "bfloat16"]) == 0
    labels = [label for label in rows(capsys.readouterr().out) if label.startswith("ours")]
    assert [label.partition(", ")[2] for label in labels] == [
        "100% of the tokens",
        "100% of the tokens, known beforehand",
    ]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (300, 5, 7)])
def test_the_smallest_shapes_are_measured_too(shape, capsys):
    assert main.main([*TINY, "--shape", *map(str, shape)]) == 0
    assert len(rows(capsys.readouterr().out)) >= 4


def test_it_runs_where_there_are_no_benchmarks(tmp_path):
    code = (
        "import sys; sys.modules['benchmarks'] = None\n"
        "from entropy_kernels.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code, *TINY]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "eager: all logits" in rows(done.stdout)
    assert list(tmp_path.iterdir()) == []
