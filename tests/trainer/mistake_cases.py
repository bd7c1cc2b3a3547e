"""What the tests of mistakes share: a folder of work that is done, and what a command says."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.trainer.small import Even, on_even, save_folder, settings, use_task  # noqa: F401
from trainer.__main__ import main
from trainer.presets import PRESETS
from trainer.train import train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, questions, a run of one step, an evaluation, and a plain file."""
    folder = tmp_path_factory.mktemp("made")
    save_folder(folder / "model", spread=0.4)
    rows = [{"prompt": f"{i} + {7 - i} =", "answer": "7"} for i in range(3)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "file").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        train(settings(Path(), "model", steps=1))
        assert main([*EVALUATE, "--out", "evaluation"]) == 0
    return folder


EVALUATE = [
    *("evaluate", "--model", "model", "--data", "file:sums.jsonl", "--device", "cpu"),
    *("--samples", "2", "--max-new-tokens", "4"),
]


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it as the working directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = settings(Path(), "model", steps=2)
    monkeypatch.setitem(PRESETS, "tiny", lambda: config)
    return tmp_path / "here"


def said(capsys, *arguments):
    """The status of a command, and what it has said on stderr that is no warning and no bar."""
    capsys.readouterr()
    try:
        status = main(list(arguments))
    except SystemExit as stopped:
        status = stopped.code
    lines = capsys.readouterr().err.splitlines()
    other = re.compile(r"warning: |Loading weights|Writing model|Generating|^\s*$")
    return status, [line for line in lines if not other.search(line)]


TRAIN = ["train", "--root=."]
