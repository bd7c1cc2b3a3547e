"""Truncation as an option: of a run's sampling, of its evaluations, and of `evaluate`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.small import on_even, save_folder, settings  # noqa: F401
from trainer.__main__ import main
from trainer.config import NO_TRUNCATION, Eval, Rollout, Truncation
from trainer.evaluation.command import Evaluation, engine_config, evaluate_model
from trainer.evaluation.generations import rows
from trainer.log import read_rows
from trainer.train import train

ASKED = Evaluation("tiny", ("ladder",), samples=3, problems=5, max_new_tokens=6, device="cpu")


@pytest.fixture(autouse=True)
def _here(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_folder(tmp_path_factory.mktemp("models") / "model", "qwen3", spread=0.2)


def texts(asked, **changes):
    evaluate_model(replace(asked, **changes))
    found = rows(Path(changes["out"]), {"ladder": 5})
    return [[one["text"] for one in row["responses"]] for row in found]


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def test_evaluation_with_a_set_of_one_is_greedy(capsys):
    one = texts(ASKED, top_k=1, out="one")
    assert "tiny, top-k 1" in capsys.readouterr().out
    greedy = texts(ASKED, temperature=0, out="greedy")
    assert "tiny, greedy" in capsys.readouterr().out
    assert one == greedy != texts(ASKED, out="whole")
    assert results("one")["sets"]["ladder"]["entropy"] == 0
    assert results("whole")["sets"]["ladder"]["entropy"] > 0.1
    used = results("one")["settings"]
    assert (used["top_k"], used["top_p"], used["min_p"]) == (1, 1.0, 0.0)
    assert engine_config(replace(ASKED, top_p=0.5)).rollout.truncation == Truncation(top_p=0.5)


def test_evaluations_with_other_truncation_do_not_mix():
    """One without a word of truncation had none, and goes on."""
    texts(replace(ASKED, problems=2), out="out")
    path = Path("out/settings.json")
    before = json.loads(path.read_text())
    for name in ("top_k", "top_p", "min_p"):
        del before[name]
    path.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"other settings: top_p was 1.0, now 0.9"):
        texts(ASKED, top_p=0.9, out="out")
    assert len(texts(ASKED, out="out")) == 5


def test_the_command_line_has_the_options(capsys):
    asked = "--model tiny --data ladder --problems 3 --samples 2 --max-new-tokens 4 --out out"
    assert main(["evaluate", *asked.split(), "--top-p", "0.7", "--min-p", "0.01"]) == 0
    assert "tiny, min-p 0.01, top-p 0.7" in capsys.readouterr().out


def run_of(model, root, **rollout):
    whole = settings(root, model, steps=2)
    return replace(
        whole,
        rollout=replace(whole.rollout, **rollout),
        eval=Eval(every=1, problems=8, samples=2, top_k=1),
    )


def test_a_run_samples_trains_and_evaluates_with_truncation(model, tmp_path):
    config = run_of(model, tmp_path, top_p=0.7, top_k=4)
    train(config)
    logged = read_rows(config.folder / "metrics.jsonl")
    for row in (row for row in logged if "eval/accuracy" in row):
        assert row["eval/accuracy"] == row["eval/greedy"]
    entropies = [row["entropy/mean"] for row in logged if "entropy/mean" in row]
    assert entropies
    # Four tokens have ln 4 at most.
    assert 0 < max(entropies) < 1.387
    page = (config.folder / "report.html").read_text()
    for words in ("top-k 4, top-p 0.7", "top-k 1"):
        assert words in page
    # Its evaluations go on as they were, and others are asked for by name.
    afterwards = Evaluation(str(config.folder), device="cpu", problems=8)
    assert json.loads(evaluate_model(afterwards).read_text())["settings"]["top_k"] == 1
    asked = replace(afterwards, top_k=0, out="other")
    assert json.loads(evaluate_model(asked).read_text())["settings"]["top_k"] == 0


def test_a_resumed_run_keeps_its_truncation(model, tmp_path):
    train(run_of(model, tmp_path, top_p=0.7))
    other = run_of(model, tmp_path, top_p=0.8)
    with pytest.raises(ValueError, match=r"rollout.top_p was 0.7, now 0.8"):
        train(replace(other, steps=3))
    train(replace(other, steps=3, eval=Eval(top_p=0.5)), allow_changes=["rollout.top_p"])


@pytest.mark.parametrize("kind", [Rollout, Eval, Truncation])
@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"top_k": -1}, "top_k must be at least 0; got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1.1"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\]; got -0.1"),
        ({"min_p": float("nan")}, r"min_p must lie in \[0, 1\]; got nan"),
    ],
)
def test_shares_outside_of_their_ranges_are_refused(kind, limits, says):
    with pytest.raises(ValueError, match=says):
        kind(**limits)
    with pytest.raises(ValueError, match=says):
        replace(ASKED, **limits)


def test_truncation_says_what_it_is():
    assert NO_TRUNCATION.off
    assert str(NO_TRUNCATION) == ""
    assert not Truncation(min_p=0.1).off
    assert str(Truncation(top_k=20, top_p=0.95, min_p=0.05)) == "min-p 0.05, top-k 20, top-p 0.95"
