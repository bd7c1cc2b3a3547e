"""Mistakes of a user: a line that names what is wrong, in the place of a traceback.

An error that is none of these keeps its traceback: `main` raises it, and the test with it.
"""

import ast
import errno
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT
from tests.trainer.mistake_cases import EVALUATE, TRAIN, here, made, on_even, said  # noqa: F401
from trainer import errors
from trainer.__main__ import main
from trainer.config import Config, Optimizer

# The command line.


@pytest.mark.parametrize(
    "command",
    [
        *("train", "watch", "report", "export", "compare", "plan"),
        *("analyze patterns", "analyze temperatures", "analyze evolution"),
    ],
)
def test_each_command_has_help(capsys, command):
    assert said(capsys, *command.split(), "--help") == (0, [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "error: no command 'trian'; did you mean train?"),
        (["evalute", "--model", "x"], "error: no command 'evalute'; did you mean evaluate?"),
        (["--steps", "3"], "error: no command '--steps'"),
        (["cook"], "error: no command 'cook'"),
        (["analyze", "pattern"], "error: no analysis 'pattern'; did you mean patterns?"),
        (["analyze", "cook"], "error: no analysis 'cook'"),
    ],
)
def test_an_unknown_command_is_named_with_the_nearest(capsys, arguments, says):
    status, lines = said(capsys, *arguments)
    assert status == 2
    assert lines[0] == says


def test_help_is_a_command_too(capsys):
    assert main(["help"]) == 0
    assert "    train [PRESET] [--options] " in capsys.readouterr().out


# Names, folders and devices.


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../b", "/tmp/x", "a\0b", "a\nb"])
def test_a_run_lies_below_its_root(name):
    with pytest.raises(ValueError, match=r"name must be that of a folder below root, .*; got '"):
        Config(name=name)
    assert Config(name="läufe/seed 0").name == "läufe/seed 0"


def test_a_gradient_is_not_clipped_to_a_negative_norm():
    for norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="grad_clip must be > 0; got"):
            Optimizer(grad_clip=norm)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--root=file"], "file/run: Not a directory: a folder is wanted there"),
        (["train", "--root=file/x"], "file/x/run: Not a directory: a folder is wanted there"),
        ([*TRAIN, "--name=file"], "file: File exists: a folder is wanted there"),
        (["train", "--root=/sys/x"], "/sys/x: Operation not permitted"),
        (["train", "--root=/proc/none"], "/proc/none/run cannot be made: No such file"),
        ([*TRAIN, "--name=" + "x" * 300], "File name too long"),
        ([*EVALUATE, "--out=file"], "file: File exists: a folder is wanted there"),
        ([*EVALUATE, "--out=file/x"], "file/x: Not a directory: a folder is wanted there"),
        (["export", "run", "file/x"], "file: File exists: a folder is wanted there"),
        (["compare", "--root=file"], "file/ladder: Not a directory"),
        (["compare", "--out=model"], "out must be a file; got the folder model"),
        (["compare", "--label=../x"], "name must be that of a folder below root"),
        (["watch", "file"], "file is a file: wanted the folder of a run"),
        (["report", "model"], "model/run.json is missing: model is not the folder of a run"),
        (["watch", "none"], "none does not exist: wanted the folder of a run"),
    ],
)
def test_a_folder_that_cannot_be_is_named(here, capsys, arguments, says):  # noqa: F811
    before = sorted(here.rglob("*"))
    status, (line,) = said(capsys, *arguments)
    assert status == 1
    assert line.startswith("error: ")
    assert says in line
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "xpu", "nonsense", "", "meta", "CPU"])
def test_a_device_that_torch_does_not_have_is_named(here, capsys, device):  # noqa: F811
    if device[:4] == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    for command in ([*TRAIN, "--name=other"], [*EVALUATE, "--out=other"]):
        status, (line,) = said(capsys, *command, f"--device={device}")
        assert status == 1
        wanted = 'error: device must be "auto" or one that torch has here, such as "cpu"; got '
        assert line.startswith(f"{wanted}{device!r}: ")
        assert not Path("other").exists()


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_cannot_be_the_same_for_several_ranks(here, capsys, monkeypatch, device):  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, (line,) = said(capsys, *TRAIN, f"--device={device}")
    assert status == 1
    assert re.match(r'error: device must be "auto", "cuda" or "cpu" (for several|under)', line)


# What is a line.


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "checkpoint x needs room"), "checkpoint x needs room"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system"),
        # Our own.
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None),
        (KeyError("x"), None),
        (RuntimeError("CUDA error"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None),
    ],
)
def test_what_is_a_line_and_what_a_traceback(error, text):
    assert errors.line(error) == text


def test_of_several_ranks_one_tells(monkeypatch, capsys):
    def plan(_):
        raise error

    error = ValueError("wrong")
    monkeypatch.setattr("trainer.plan.command.main", plan)
    for rank, teller, line in (
        (0, 0, "error: wrong\n"),
        (2, 0, ""),
        (2, 2, "rank 2: error: wrong\n"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        error.teller = teller
        assert main(["plan"]) == 1
        assert capsys.readouterr().err == line


# Where the output goes.


@pytest.mark.parametrize("arguments", [["help"], ["plan", "--help"], ["report", "run"]])
def test_a_reader_who_has_gone_is_no_error(here, monkeypatch, capfd, arguments):  # noqa: F811
    """`python -m trainer ... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(arguments) == 141
        print("what comes after", flush=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [BrokenPipeError, KeyError])
def test_an_error_of_our_own_keeps_its_traceback(monkeypatch, error):
    """Another broken pipe than that of a reader who has gone, too."""

    def plan(_):
        raise error("ours")

    monkeypatch.setattr("trainer.plan.command.main", plan)
    with open(os.devnull, "w") as read, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", read)
        with pytest.raises(error, match="ours"):
            main(["plan"])


def test_an_encoding_that_lacks_a_character_does_not_end_a_run(here, monkeypatch):  # noqa: F811
    Path("run").rename("läufe")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["report", "läufe"]) == 0
    assert written.getvalue() == b"report: l\\xe4ufe/report.html\n"


def test_files_are_utf_8_in_every_locale():
    """Each text that the trainer reads or writes names its encoding."""
    nameless = []
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                named = "utf-8" in texts or any(k.arg == "encoding" for k in node.keywords)
                if node.func.attr in ("read_text", "write_text") and not named:
                    nameless.append(f"{path.name}:{node.lineno}")
    assert not nameless
