"""Every `python -m trainer` command of README and docs is one that the parsers take."""

import json
import re
import shlex
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for a reader's own, and is no option's value as it is.
STAND_INS = {
    "PRESET": "tiny",
    "[PRESET]": "tiny",
    "RUN": "runs/mine",
    "OUT": "exported/mine",
    "M": "runs/mine",
    "MODEL": "runs/mine",
    "D": "aime24",
    "DATA": "aime24",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"^ {4,}.*$", re.M)
COMMAND = re.compile(r"-m trainer ([a-z].*)")


def commands():
    """Page and arguments of each command in a code block, and of those in a line with options."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text())  # lines that go on
        blocks = [code for kind, code in FENCE.findall(text) if kind in ("", "sh", "bash")]
        prose = FENCE.sub("", text)
        lines = [*"".join(blocks).splitlines(), *INDENTED.findall(prose)]
        for code in re.findall(r"`([^`]+)`", INDENTED.sub("", prose)):
            # A name without options is a name, and no command.
            lines += [code] if re.search(r"trainer \w+ .*(--|[A-Z]{3})", code) else []
        for line in lines:
            if found := COMMAND.search(" ".join(line.split())):
                yield page.name, re.split(r" #| > ", found[1])[0]


COMMANDS = sorted(set(commands()))


def test_there_are_commands_of_every_kind():
    kinds = {command.split()[0] for _, command in COMMANDS}
    assert kinds == {
        *("train", "evaluate", "analyze", "compare", "plan"),
        *("watch", "report", "export"),
    }
    assert len(COMMANDS) > 25


@pytest.fixture
def _nothing_runs(monkeypatch):
    def nothing(*arguments, **options):
        return 0

    for name in (
        *("train.train", "evaluation.command.evaluate_model", "studies.compare.compare"),
        *("report.watch.watch", "report.page.write_report"),
        "studies.analyze.patterns.analyze_patterns",
        "studies.analyze.temperatures.analyze_temperatures",
        "studies.analyze.evolution.analyze_evolution",
    ):
        monkeypatch.setattr(f"trainer.{name}", nothing)
    monkeypatch.setattr("trainer.checkpoint.find", lambda *_: Path())
    monkeypatch.setattr(
        "trainer.checkpoint.export._write", lambda found, folder, dtype: folder.mkdir(parents=True)
    )


def _write_settings(path):
    """A file of settings, or a run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text("steps: 5\n")
        return
    path.mkdir()
    run = {"config": asdict(PRESETS["tiny"]()), "starts": [{"time": "now"}]}
    (path / "run.json").write_text(json.dumps(run))


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[:60])
def test_a_command_is_understood(page, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [STAND_INS.get(word, word) for word in shlex.split(command)]
    for option, value in pairwise(arguments):
        if option == "--config":
            _write_settings(Path(value))
        if option == "--branch":
            _write_settings(Path(value.partition("@")[0]))
    try:
        status = main(arguments)
    except SystemExit as end:  # of tyro, and after --help
        status = end.code
    assert status == 0, capsys.readouterr().err
