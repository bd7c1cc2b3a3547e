"""The page of the study: its commands, its blocks, and that it is what the result files say."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tyro

from benchmarks import paper, paper_page, paper_tables
from trainer.launch.command_line import parse
from trainer.studies.analyze.evolution import Evolution
from trainer.studies.analyze.patterns import Patterns
from trainer.studies.analyze.temperatures import Temperatures
from trainer.studies.compare import Comparison, runs
from trainer.studies.compare.arms import STUDIES

ROOT = Path(__file__).parents[2]
SETTINGS = {"patterns": Patterns, "evolution": Evolution, "temperatures": Temperatures}


def test_the_page_is_what_the_result_files_say():
    assert paper_page.write(ROOT, check=True) == 0


def test_every_figure_of_the_page_is_there_and_names_its_data():
    text = (ROOT / paper_page.PAGE).read_text()
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert names
    for name in names:
        path = ROOT / "docs" / name
        assert path.exists(), name
        if path.suffix == ".svg":
            description = ElementTree.parse(path).getroot()[0].text
            for source in description.split(", "):
                assert (ROOT / source).exists(), description


def test_results_name_their_commits():
    for path in (ROOT / paper_page.RESULTS).glob("*.json"):
        found = json.loads(path.read_text())
        for one in (found["made"], *found.get("runs", [])):
            for commit in one.get("commits") or [one["commit"]]:
                assert re.fullmatch(r"[0-9a-f]{40}", commit), path
            assert one["dirty"] is False, path


@pytest.mark.parametrize("task", paper.TASKS, ids=lambda task: task.label)
def test_commands_are_understood(task):
    command, preset, *rest = paper.comparison(task, hours=1.5)
    assert command == "compare"
    settings = parse([preset, *rest], command, around=lambda c: Comparison(config=c))
    assert (settings.hours, settings.config.steps) == (1.5, paper.STEPS)
    assert {config.name.split("/")[0] for config in runs(settings)} == {task.label}
    trained = {config.name for config in runs(settings)}
    assert settings.config.data.task == task.data
    assert settings.config.rollout.max_new_tokens == task.max_new_tokens
    for analysis in paper.analyses(task):
        asked = tyro.cli(SETTINGS[analysis.kind], args=analysis.arguments)
        run = re.sub(r"/checkpoints/.*", "", asked.model)
        assert str(Path(run).relative_to(paper.RUNS)) in trained
        assert asked.data == (task.data,)


@pytest.mark.parametrize("task", paper.TASKS, ids=lambda task: task.label)
def test_the_rules_are_runs_beside_the_others(task):
    found = []
    for command, *rest in (paper.comparison(task, 0.0), paper.rules_comparison(task, 0.0)):
        settings = parse(rest, command, around=lambda c: Comparison(config=c))
        found.append({config.name: config for config in runs(settings)})
    both = found[0].keys() & found[1].keys()
    assert {name.split("/")[1] for name in both} == {"top-20", "all", "random-20"}
    assert all(found[0][name] == found[1][name] for name in both)
    assert len(found[1]) == paper.SEEDS * len(STUDIES["rules"])


def test_blocks_are_filled_and_an_unknown_page_is_refused(tmp_path):
    text = (ROOT / paper_page.PAGE).read_text()
    empty = paper_page.fill(text, tmp_path)
    assert empty.count(paper_tables.NOTHING) == len(paper_page.BLOCKS)
    assert paper_page.fill(empty, ROOT / paper_page.RESULTS) == text
    with pytest.raises(ValueError, match="needs the blocks"):
        paper_page.fill(text.replace("paper:masks", "paper:mask"), tmp_path)


def test_what_has_no_run_is_left_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(paper, "_run", lambda arguments: asked.append(arguments) or 1)
    run = tmp_path / paper.RUNS / "ladder" / "top-20" / "seed-1"
    (run / "checkpoints" / f"step-{paper.STEPS:06d}").mkdir(parents=True)
    every = [a.name for task in paper.TASKS for a in paper.analyses(task)]
    unable = paper.analyse()
    assert sorted(unable) == sorted(every)
    ready = [
        "ladder-patterns-seed-1",
        "ladder-temperatures-seed-1",
        "ladder-evolution-top-20-seed-1",
    ]
    assert [arguments[:2] for arguments in asked] == [
        ["analyze", kind] for kind in ("patterns", "temperatures", "evolution")
    ]
    said = capsys.readouterr().err
    assert f"failed: {', '.join(ready)}" in said
    assert "left, for want of their runs: ladder-patterns-seed-0" in said


def test_results_are_copied_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order = []
    monkeypatch.setattr(paper, "_run", lambda arguments: order.append(arguments[0]) or 0)
    monkeypatch.setattr(paper, "keep", lambda: order.append("keep"))
    monkeypatch.setattr(paper, "analyse", lambda: order.append("analyse") or [])
    assert paper.study(0) == 0
    assert order == ["compare", "compare", "analyse", "keep"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    analysis = next(paper.analyses(paper.TASKS[0]))
    for path, text in ((paper.TASKS[0].comparison, "[1,\n2]"), (analysis.file, "[3]")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    paper.keep()
    assert (paper.RESULTS / "ladder-comparison.json").read_text() == "[1, 2]\n"
    assert (paper.RESULTS / "ladder-patterns-seed-0.json").read_text() == "[3]\n"
    assert len(list(paper.RESULTS.iterdir())) == 2
