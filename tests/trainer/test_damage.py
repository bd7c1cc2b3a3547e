"""Damaged files, those of another version, and full disks: a line that names the file."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors import SafetensorError

import trainer.run
from tests.trainer.mistake_cases import EVALUATE, TRAIN, here, made, on_even, said  # noqa: F401
from trainer.config import Data
from trainer.log import RunLog, append_text, read_run, replace_text
from trainer.report.trackers import _id
from trainer.studies.analyze.temperatures import FILE as TEMPERATURES
from trainer.tasks import make_task

RUN = {"config": {"steps": 1, "data": {"task": "ladder"}}, "starts": [{"time": "now"}]}
DAMAGED = {
    "cut off": "{",
    "empty": "",
    "a list": "[]",
    "binary": b"\xff\xfe",
    "without starts": json.dumps({"config": {"steps": 1}}),
    "with no start": json.dumps({**RUN, "starts": []}),
    "starts of texts": json.dumps({**RUN, "starts": ["x"]}),
    "without steps": json.dumps({**RUN, "config": {}}),
    "steps a text": json.dumps({**RUN, "config": {"steps": "x"}}),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_run_json_is_named(tmp_path, what):
    write(tmp_path / "run.json", DAMAGED[what])
    with pytest.raises(ValueError, match=r"run\.json is damaged, or of another version .* copy"):
        read_run(tmp_path)


ROW = '{"step": 1, "loss": 0.5}\n'
READERS = [
    ["report", "run"],
    ["watch", "run"],
    TRAIN,
    ["evaluate", "--model=run", "--data=file:sums.jsonl"],
]


@pytest.mark.parametrize(
    ("command", "content"),
    [*((reader, "{") for reader in READERS), *((READERS[i], json.dumps(RUN)) for i in (0, 3))],
    ids=lambda value: value[0],
)
def test_every_reader_of_a_run_json_that_is_not_ours_says_so(here, capsys, command, content):  # noqa: F811
    Path("run/run.json").write_text(content)
    status, (line,) = said(capsys, *command)
    assert status == 1
    assert re.match(r"error: run\S* is damaged, or of another version of the trainer", line)
    assert content != "{" or line.startswith("error: run/run.json ")


READ = {
    "run": ["report", "run"],
    "evaluation": [*EVALUATE, "--out=evaluation"],
    "sweep": ["analyze", "temperatures", *EVALUATE[1:], "--out=sweep"],
}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run/metrics.jsonl", "{\n" + ROW, "run/metrics.jsonl, line 1: not JSON"),
        ("run/metrics.jsonl", ROW + '{"loss": 1}\n', "line 2: a row needs an integer step"),
        ("run/metrics.jsonl", '{"step": 1, "loss": "x"}\n', "line 1: loss is no number, but 'x'"),
        ("run/metrics.jsonl", b"\xff\n\n", "run/metrics.jsonl is damaged"),
        ("run/metrics.jsonl", "", "run/metrics.jsonl is empty"),
        ("run/samples.jsonl", "{\n{}\n", "run/samples.jsonl, line 1: not JSON"),
        (
            "run/samples.jsonl",
            '{"step": 1, "tokens": ["a"], "entropy": [], "selected": []}\n',
            "run/samples.jsonl, line 1: lists of different lengths, [0, 1]",
        ),
        ("run/samples.jsonl", '{"step": 1}\n', "run is damaged, or of another version"),
        ("run/samples.jsonl", b"\xff\n\n", "run/samples.jsonl is damaged"),
        ("evaluation/settings.json", "{", "settings.json is damaged"),
        ("evaluation/settings.json", "[1]", "settings.json is damaged"),
        ("evaluation/generations.jsonl", "{\n{}\n", "generations.jsonl, line 1 is damaged"),
        ("evaluation/generations.jsonl", "[]\n", "generations.jsonl, line 1 is damaged"),
        ("evaluation/generations.jsonl", b"\xff\n", "generations.jsonl, line 1 is damaged"),
        (f"sweep/{TEMPERATURES}", '{"settings": {}}', "json is damaged: KeyError('threshold'); "),
    ],
)
def test_a_damaged_file_is_named(here, capsys, name, content, says):  # noqa: F811
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    write(path, content)
    status, (line,) = said(capsys, *READ[str(path.parent)])
    assert status == 1
    assert says in line
    assert path.parent.name == "run" or ("another --out" in line and name in line)


def test_an_evaluation_that_failed_before_any_answer_binds_nothing(here, capsys):  # noqa: F811
    """A misspelt verifier is in its settings.json; the right one goes into the same folder."""
    arguments = [*EVALUATE, "--out=fresh"]
    status, (line,) = said(capsys, *arguments, "--function=none:verifier")
    assert status == 1
    assert "cannot import none" in line
    assert said(capsys, *arguments) == (0, [])


def test_a_file_in_the_place_of_the_checkpoints_changes_nothing(here, capsys):  # noqa: F811
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").write_text("x")
    before = Path("run/metrics.jsonl").read_text()
    status, (line,) = said(capsys, *TRAIN)
    assert status == 1
    assert line == "error: run/checkpoints must be a folder; it is a file: move it away"
    assert Path("run/metrics.jsonl").read_text() == before


def test_a_damaged_id_of_a_tracked_run_is_named(tmp_path):
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(ValueError, match=r"tracking\.json is damaged: .* a new run is tracked"):
        _id(tmp_path, 3)


# Full disks.

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


@FULL
@pytest.mark.parametrize(
    ("name", "method"), [("metrics.jsonl", "write"), ("samples.jsonl", "samples")]
)
def test_a_full_disk_names_the_file(here, capsys, monkeypatch, name, method):  # noqa: F811
    write = getattr(RunLog, method)

    def fill(log, *arguments):
        """At the write itself: who reads a device that is always full reads for ever."""
        (log.folder / name).unlink(missing_ok=True)
        (log.folder / name).symlink_to("/dev/full")
        write(log, *arguments)

    monkeypatch.setattr(RunLog, method, fill)
    status, (line,) = said(capsys, *TRAIN)
    assert status == 1
    full = "No space left on device: make room, and run the same command"
    assert line == f"error: run/{name}: {full}"


@FULL
def test_a_full_disk_names_each_kind_of_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        append_text(path, "x")

    def write(temporary, *_, **__):
        temporary.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace_text(path, "x")
    assert list(tmp_path.iterdir()) == [path]


def test_two_who_replace_one_file_do_not_meet(tmp_path, monkeypatch):
    """As `report` by hand while a run ends: another process has its temporary file there."""
    (tmp_path / f"file.{os.getpid() + 1}.tmp").write_text("half")
    replace_text(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / f"file.{os.getpid() + 1}.tmp").read_text() == "half"


@pytest.mark.parametrize("what", ["export", "warm start"])
def test_a_full_disk_names_a_whole_model(here, capsys, monkeypatch, what):  # noqa: F811
    """safetensors has an error of its own, with the system's number in its text."""

    def save(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: ... (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
    if what == "export":
        path, arguments = "out", ["export", "run", "out"]
    else:
        task = make_task(Data(), 0)
        monkeypatch.setattr(trainer.run, "make_task", lambda *_: task)
        options = ["--model.path=tiny", "--warm-start.steps=1", "--warm-start.traces=8"]
        path, arguments = "kept/", [*TRAIN, "--name=warm", *options, "--warm-start.cache=kept"]
    status, (line,) = said(capsys, *arguments)
    assert status == 1
    full = "No space left on device: make room, and run the same command"
    assert re.fullmatch(rf"error: {path}\w*: {full}", line)
