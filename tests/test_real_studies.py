"""The studies on a pretrained model: what is done and in which order, and what is kept."""

import json
import shutil
import types

import pytest

from benchmarks.real_model import __main__ as conductor
from benchmarks.real_model import kept, prompts, studies
from tests.gemma import save_gemma


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a Gemma 3 of random weights that reads bytes."""
    return save_gemma(tmp_path_factory.mktemp("gemma"))


def _kind(*tokens):
    """Patterns of tokens: text or id, count, mean."""
    return {
        **dict.fromkeys(kept.OF_A_KIND, 0.0),
        "count": sum(count for _, count, _ in tokens),
        "mean": 0.5,
        "below_0.01": 0.25,
        "made": {},
        "histogram": {},
        "cdf": {},
        "tokens": [
            {"text": str(token), "token": token, "count": count, "mean": mean}
            for token, count, mean in tokens
        ],
    }


def test_the_papers_words_are_found_with_spaces_and_capitals():
    names = list(prompts.KINDS)
    kinds = dict.fromkeys(names[1:], _kind(("the", 10, 0.5), (" however", 1, 2.0)))
    kinds[names[0]] = _kind(("However", 1, 6.0), ("howevers", 5, 4.0), ("thus", 4, 0.25))
    words = {word["text"]: word for word in kept.joined(kinds)["forking"]}
    assert words["however"]["count"] == 4
    assert words["however"]["mean"] == pytest.approx((3 * 2.0 + 6.0) / 4)
    assert words["however"]["lower"] == pytest.approx((30 + 3 + 4) / 43)
    assert words["thus"]["lower"] == 0
    assert words["wait"] == {"text": "wait", "count": 0}


def test_tokens_of_all_kinds_count_together():
    names = list(prompts.KINDS)
    kinds = {name: _kind((1, 50, 1.0), (2, 150, 0.1)) for name in names[1:]}
    kinds = {names[0]: _kind((1, 50, 3.0), (3, 99, 9.0)), **kinds}
    found = kept.joined(kinds)
    assert found["count"] == 50 + 99 + 3 * 200
    assert [token["text"] for token in found["highest"]] == ["1", "2"]
    assert [token["text"] for token in found["lowest"]] == ["2", "1"]
    assert found["highest"][0]["mean"] == pytest.approx((3 + 1 + 1 + 1) / 4)
    assert found["highest"][0]["share"] == pytest.approx(200 / found["count"])


def test_what_is_missing_is_told_with_its_minutes(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "results" / "real_model")
    command = ["--model", str(small), "--root", str(tmp_path / "runs"), "--plan"]
    assert conductor.main([*command, "--only", "base", "learning"]) == 0
    minutes = {part.name: part.minutes for part in conductor.PARTS}
    total = minutes["base"] + minutes["learning"]
    assert f"{total:.0f} minutes in all" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        conductor.main(["--model", str(tmp_path), "--plan"])
    assert "folder with config.json; got" in capsys.readouterr().err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Results that go to a folder of the test's; how often the page was written."""
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "results" / "real_model")
    written = []
    monkeypatch.setattr(conductor.paper_page, "write", written.append)
    return written


def test_what_was_measured_elsewhere_is_measured_here(small, tmp_path, monkeypatch, elsewhere):
    commands = []
    monkeypatch.setattr(conductor, "_run", lambda command, *_: commands.append(command) or 0)
    command = ["--model", str(small), "--root", str(tmp_path / "runs"), "--only", "steps"]
    for measured in (1, 1):  # the second call finds it done
        assert conductor.main(command) == 0
        assert len(commands) == measured
    assert len(elsewhere) == 2, "the page is written where nothing was missing too"
    monkeypatch.setattr(conductor, "_run", lambda *_: 1)
    (tmp_path / "runs" / "steps.measured").unlink()
    assert conductor.main(command) == 1
    assert not (tmp_path / "runs" / "steps.measured").exists()


def test_a_folder_keeps_the_studies_of_one_model(small, tmp_path, capsys, monkeypatch, elsewhere):
    monkeypatch.setattr(conductor, "_run", lambda *_: 0)
    root = ["--root", str(tmp_path / "runs"), "--only", "steps"]
    assert conductor.main(["--model", str(small), *root]) == 0
    other = tmp_path / "other"
    shutil.copytree(small, other)
    assert conductor.main(["--model", str(other), *root]) == 0, "the same model elsewhere"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(SystemExit):
        conductor.main(["--model", str(other), *root])
    assert f"has the studies of {other}; choose another --root" in capsys.readouterr().err


def test_a_part_whose_beginning_failed_is_left_out(small, tmp_path, capsys, monkeypatch, elsewhere):
    commands = []
    monkeypatch.setattr(conductor, "_run", lambda command, *_: commands.append(command) or 1)
    root = ["--root", str(tmp_path / "runs"), "--only", "base", "learning", "evolution"]
    assert conductor.main(["--model", str(small), *root]) == 1
    assert len(commands) == 1
    told = capsys.readouterr().err
    assert "learning is left out: base is not done" in told
    assert "failed: base, learning, evolution" in told


def test_runs_start_where_the_disk_has_room_for_their_checkpoints(small, tmp_path, monkeypatch):
    """Two runs at a time, with a checkpoint and another in writing, and two that stay."""
    found = studies.Studies(small, tmp_path / "runs")
    found.started.mkdir(parents=True)
    (found.started / "model.safetensors").write_bytes(bytes(1000))
    (found.run("all", 0) / "checkpoints").mkdir(parents=True)
    (found.run("all", 0) / "checkpoints" / "weights").write_bytes(bytes(3000))
    need = 3 * 1000 * (2 * 2 + 2) - 3000
    for free, enough in ((need, True), (need - 1, False)):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(conductor.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert conductor._has_room(found) == enough
        assert enough or conductor.learning(found) == 1


def test_every_run_is_one_of_those_done_together():
    found = [(arm, seed) for arms, seeds in conductor._together() for arm in arms for seed in seeds]
    every = [(arm, seed) for arm in studies.ARMS for seed in range(studies.SEEDS)]
    assert sorted(found) == sorted(every)
    assert max(len(arms) * len(seeds) for arms, seeds in conductor._together()) == 2


@pytest.mark.slow
def test_all_studies_run_to_their_results_and_go_on_where_they_were(small, tmp_path, monkeypatch):
    """The commands themselves, with few and short answers of a model of random weights."""
    kinds = {name: prompts.KINDS[name] for name in ("few-shot-sums", "code")}
    for name, value in {
        "ARMS": ("top-20", "all"),
        "EVOLVED": ("top-20",),
        "SEEDS": 1,
        "STEPS": 2,
        "PROBLEMS": 6,
        "SUMS_TOKENS": 6,
        "TOKENS": 6,
        "LOW": (0.5, 1.0),
        "HIGH": (0.5,),
        "KINDS": kinds,
        "PROMPTS": 4,
        "SUMS": 200,
        "WANTED": 2,
        "FOLDER": tmp_path / "results",
    }.items():
        for module in (studies, kept, conductor, prompts):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(conductor.paper_page, "write", lambda _: None)
    command = ["--model", str(small), "--root", str(tmp_path / "runs"), "--only"]
    parts = ["base", "learning", "patterns", "temperatures", "evolution"]
    assert conductor.main([*command, *parts]) == 0
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert found.keys() == {
        *("learning.json", "patterns.json", "temperatures.json", "evolution-top-20.json")
    }
    assert [run["arm"] for run in found["learning.json"]["runs"]] == ["top-20", "all"]
    assert found["patterns.json"]["kinds"].keys() == kinds.keys()
    assert len(found["temperatures.json"]["points"]) == 3
    assert found["evolution-top-20.json"]["names"] == ["step-000000", "step-000002"]
    # Checkpoints of runs that are not analysed are gone.
    runs = tmp_path / "runs"
    left = [path.parent.parent.name for path in (runs / "sums").glob("*/*/checkpoints")]
    assert left == ["top-20"]
    # A sweep that was stopped goes on.
    sweep = runs / "temperatures" / "temperatures.json"
    whole = json.loads(sweep.read_text())
    sweep.write_text(json.dumps({**whole, "points": whole["points"][:1]}))
    assert conductor.main([*command, *parts]) == 0
    assert len(json.loads(sweep.read_text())["points"]) == 3
