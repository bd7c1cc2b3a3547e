"""Evaluation while a run trains, on several sets, and that an evaluation afterwards agrees."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

import trainer.run
from tests.trainer.small import Even, save_folder, settings
from trainer.config import Data, Engine, Eval, Reward
from trainer.evaluation.command import Evaluation, engine_config, evaluate_model
from trainer.evaluation.estimates import estimate, wilson
from trainer.evaluation.results import summarize
from trainer.evaluation.sets import make_set, metric_names
from trainer.log import read_rows
from trainer.studies.analyze.patterns import Patterns, analyze_patterns
from trainer.studies.analyze.temperatures import Temperatures, analyze_temperatures
from trainer.tasks.contamination import count_seen
from trainer.train import train

# Verdicts of .85 and .3, so that nothing is right for whoever asks for 1.
VERIFIER = """
def judge(prompt, response, answer):
    assert answer == "7", answer
    return 0.85 if response[:1].isdigit() else 0.3
"""
NAMES = ("", "amc23.", "hard.", "ladder.")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, data and a verifier, and the run of two steps that used them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "own_judge.py").write_text(VERIFIER)
    save_folder(folder / "model", spread=0.4)

    def write(name, **row):
        rows = [{key: text.format(i=i, j=7 - i) for key, text in row.items()} for i in range(8)]
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))

    write("train.jsonl", ask="{i} + {j} =", gold="7")
    write("hard.jsonl", ask="{i} + 0 + {j} =", gold="7")
    write("amc.jsonl", question="{j} + {i} =", answer="7")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        train(config(folder))
        yield folder


def config(folder: Path):
    return settings(
        folder,
        str(folder / "model"),
        steps=2,
        data=Data(
            f"file:{folder / 'train.jsonl'}", "ask", "gold", template="{question} 5",
            instruction="9", test_fraction=0.4,
        ),
        reward=Reward("own_judge:judge", right=0.8, seconds=7.0, workers=1, format="answer"),
        engine=Engine(max_model_len=60),
        eval=Eval(
            2, 5, samples=3, temperature=0.9, max_new_tokens=4,
            data=(f"amc23={folder / 'amc.jsonl'}", f"file:{folder / 'hard.jsonl'}", "ladder"),
        ),
    )  # fmt: skip


@pytest.fixture
def rows(place):
    return [row for row in read_rows(place / "run" / "metrics.jsonl") if "eval/accuracy" in row]


def test_every_set_is_evaluated_at_the_start_and_the_end(place, rows):
    assert [row["step"] for row in rows] == [0, 2]
    for row in rows:
        for name in NAMES:
            own = {
                k.removeprefix("eval/" + name): v
                for k, v in row.items()
                if k.startswith("eval/" + name)
            }
            problems = {"": own["problems"], "ladder.": 5}.get(name, 8)
            assert own["problems"] == problems
            assert 0 <= own["low"] <= own["accuracy"] <= own["high"] <= 1
            assert own["low"] < own["high"]
            greedy = [own[f"greedy{end}"] for end in ("", "_low", "_high")]
            assert greedy == pytest.approx(list(wilson(own["greedy"], int(problems))))
            assert own["length"] <= 4
            assert own["timeouts"] == own["crashes"] == 0
        # Verdicts of .85 count as right, and the mean verdict stands beside.
        for name in ("", "hard."):
            accuracy, reward = row[f"eval/{name}accuracy"], row[f"eval/{name}reward"]
            assert reward == pytest.approx(0.85 * accuracy + 0.3 * (1 - accuracy))
        # Sets with answers of their own kind are judged as ever, by verdicts of 1.
        assert row["eval/amc23.reward"] == pytest.approx(row["eval/amc23.accuracy"])
    assert 0 < rows[0]["eval/accuracy"] < 1
    assert 1 <= rows[0]["eval/problems"] <= 5


def test_an_evaluation_afterwards_gives_the_numbers_of_training(place, rows):
    run = place / "run"
    results = json.loads(evaluate_model(Evaluation(str(run), device="cpu")).read_text())
    found = results["sets"]["held-out"]
    assert found["problems"] == rows[-1]["eval/problems"]
    for part, name in (("value", "accuracy"), ("low", "low"), ("high", "high")):
        assert found["avg@3"][part] == pytest.approx(rows[-1][f"eval/{name}"])
    assert found["reward"] == pytest.approx(rows[-1]["eval/reward"])
    used = results["settings"]
    assert (used["prompt_field"], used["answer_field"], used["function"], used["right"]) == (
        "ask", "gold", "own_judge:judge", 0.8,
    )  # fmt: skip
    assert (used["seconds"], used["attention"], used["temperature"]) == (7.0, "eager", 0.9)
    assert used["engine"]["max_model_len"] == 60
    assert engine_config(Evaluation(used["model"], max_new_tokens=1)).reward.format == "answer"
    # A checkpoint of the run knows its run too; sets of other kinds are as they were in training.
    names = (f"amc23={place / 'amc.jsonl'}", f"file:{place / 'hard.jsonl'}")
    first = str(run / "checkpoints" / "step-000000")
    again = evaluate_model(Evaluation(first, names, samples=3, device="cpu"))
    sets = json.loads(again.read_text())["sets"]
    assert sets["amc23"]["avg@3"]["value"] == pytest.approx(rows[0]["eval/amc23.accuracy"])
    assert sets[names[1]]["avg@3"]["high"] == pytest.approx(rows[0]["eval/hard.high"])
    assert (sets["amc23"]["right"], sets[names[1]]["right"]) == (1.0, 0.8)


def test_held_out_problems_are_those_of_training(place, tmp_path, capsys):
    """Without the prompts that it left out; and a line where the data have been edited."""
    path = tmp_path / "sums.jsonl"
    long = " ".join(["1 +"] * 12)
    lines = [json.dumps({"ask": f"{long * (i % 2)} {i} + 1 =", "gold": "7"}) for i in range(40)]
    path.write_text("\n".join(lines))
    asked = config(place)
    data = replace(asked.data, task=f"file:{path}", max_prompt_tokens=15)
    train(replace(asked, root=str(tmp_path), steps=0, data=data, eval=Eval(9, 64)))
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert 0 < row["eval/problems"] < 20

    def evaluated(name):
        out = str(tmp_path / name)
        results = evaluate_model(Evaluation(str(tmp_path / "run"), out=out, device="cpu"))
        return json.loads(results.read_text())["sets"]["held-out"], capsys.readouterr().err

    found, told = evaluated("first")
    assert found["problems"] == row["eval/problems"]
    assert "other contents" not in told
    path.write_text("\n".join(lines[:-1]))
    _, told = evaluated("second")
    says = f"warning: file:{path} has other contents than when {tmp_path / 'run'} started last: "
    assert told.count(says) == 1


def test_what_is_given_comes_before_the_run(place, tmp_path):
    asked = Evaluation(
        str(place / "run"),
        (f"file:{place / 'amc.jsonl'}",),
        samples=1,
        problems=2,
        prompt_field="question",
        answer_field="answer",
        template="none",
        function="",
        out=str(tmp_path / "out"),
    )
    used = json.loads(evaluate_model(asked).read_text())
    assert used["settings"]["function"] == ""
    assert used["sets"][asked.data[0]]["right"] == 1.0
    line = json.loads((tmp_path / "out" / "generations.jsonl").read_text().split("\n")[0])
    assert line["prompt"] == "7 + 0 =\n\n9"


def test_the_progress_and_the_table_agree(place, tmp_path, capsys):
    """Accuracy by `right`, of all that is answered, with its interval; the mean verdict beside."""
    asked = Evaluation(str(place / "run"), out=str(tmp_path / "out"), batch_size=1, samples=1)
    results = json.loads(evaluate_model(asked).read_text())["sets"]["held-out"]
    shown = capsys.readouterr().out
    last = [line for line in shown.split("\n") if line.startswith("held-out: problems")][-1]
    accuracy = results["avg@1"]
    assert f"accuracy {accuracy['value']:.1%}" in last
    assert f"95% from {accuracy['low']:.1%}  to {accuracy['high']:.1%}" in last
    assert f"reward {results['reward']:.3g}" in last
    row = next(line for line in shown.split("\n") if "│ held-out" in line)
    assert f"{accuracy['value']:.2%}" in row
    assert row.rstrip(" │").endswith(f"{results['reward']:.4g}")


def test_analyses_of_a_run_judge_as_it_does(place, tmp_path, rows, capsys):
    run, given = str(place / "run"), {"samples": 3, "max_new_tokens": 4}
    found = json.loads(
        analyze_patterns(Patterns(run, out=str(tmp_path / "p"), **given)).read_text()
    )
    assert found["accuracy"] > 0
    assert found["problems"] == rows[0]["eval/problems"]
    low, high = found["accuracy_interval"]
    said = f"accuracy {found['accuracy']:.1%}, 95% interval {low:.1%} to {high:.1%}, of "
    assert said + f"{found['problems']} problems with 3 responses each" in capsys.readouterr().out
    page = (tmp_path / "p" / "tokens.html").read_text()
    verdicts = set(re.findall(r'<article class="is-(\w+)">\s*<span.*?>reward ([\d.]+)', page))
    assert verdicts == {("right", "0.85"), ("wrong", "0.3")}
    sweep = Temperatures(run, out=str(tmp_path / "t"), low=(), high=(1.0,), threshold=1.0, **given)
    (point,) = json.loads(analyze_temperatures(sweep).read_text())["points"]
    assert point["accuracy"]["value"] == pytest.approx(found["accuracy"])
    assert point["problems"] == found["problems"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": ("aime26",)}, "no data 'aime26'; wanted aime24"),
        ({"data": ("aime24=no.jsonl",)}, "aime24=no.jsonl cannot be read: there is no no.jsonl"),
        ({"data": ("aime24=amc.jsonl",)}, "row 0 has nothing in column 'problem'"),
        ({"data": ("amc23=long.jsonl",)}, "amc23: a prompt of 6. tokens and up to 4 new ones"),
        ({"data": ("ladder", "ladder")}, "data must name each set once"),
        (
            {"max_new_tokens": 200},
            "prompt of 1 tokens and up to 200 new .*; lower eval.max_new_tokens",
        ),
    ],
)
def test_sets_are_checked_before_the_run_has_a_folder(place, tmp_path, changes, says):
    words = " ".join("1" * 60)
    (place / "long.jsonl").write_text(json.dumps({"question": words, "answer": "7"}))
    asked = config(place)
    with pytest.raises(ValueError, match=says):
        train(replace(asked, root=str(tmp_path), eval=replace(asked.eval, **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"temperature": 0.0}, r"eval.temperature must be > 0, .*; got 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0; got -1"),
    ],
)
def test_bad_settings_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Eval(**changes)


def test_questions_that_are_trained_on_are_counted(place, tmp_path, capsys):
    words = "what is the sum of the roots of {i} ?"
    for name, text in (("train", f"Think. {words} Answer:"), ("test", words.replace("w", "W"))):
        lines = [json.dumps({"ask": text.format(i=i), "gold": "7"}) for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    asked = config(place)
    data = replace(asked.data, task=f"file:{tmp_path / 'train.jsonl'}")
    named = Eval(9, 1, data=(f"file:{tmp_path / 'test.jsonl'}",))
    train(replace(asked, root=str(tmp_path), steps=0, data=data, eval=named))
    said = capsys.readouterr().err
    seen = int(said.split("warning: ")[1].split()[0])
    # All but those held out from training, which is by hash.
    assert 1 <= seen < 8
    assert f"{seen} of 8 questions of file:{tmp_path / 'test.jsonl'} are in the training" in said


def test_repeated_questions_of_a_set_are_counted(place, tmp_path, capsys):
    """Their set stays as it is, so its intervals take them for independent."""
    path = tmp_path / "again.jsonl"
    rows = [{"ask": f"{i % 3} + 1 =", "gold": "7"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = config(place)
    train(replace(asked, root=str(tmp_path), steps=0, eval=Eval(9, 1, data=(f"file:{path}",))))
    told = f"warning: 5 of 8 questions of file:{path} are repeated"
    assert capsys.readouterr().err.count(told) == 1
    evaluate_model(Evaluation(str(tmp_path / "run"), (f"file:{path}",), out=str(tmp_path / "out")))
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize(
    ("question", "prompt", "seen"),
    [
        ("How many roots has x ^ 2", "Solve. how many\nroots has x ^ 2 Box it.", True),
        ("How many roots has x ^ 2", "how many roots has x ^ 20", False),
        ("How many roots has x ^ 2", "roots has x ^ 2", False),
        ("1 + 1 =", " 1 +  1 = ", True),
        ("1 + 1 =", "1 + 1 = ?", False),
        ([{"role": "user", "content": "a b c d e f"}], "x a b c d e f", True),
        ("a a a a a b", [{"role": "user", "content": "a a a a a a b"}], True),
    ],
)
def test_a_question_is_found_whole_in_a_prompt(question, prompt, seen):
    assert count_seen([question, "something else"], ["another", prompt]) == int(seen)


def test_sets_have_short_names_in_the_metrics():
    assert metric_names(["aime24", "file:data/hard set.jsonl", "hub:org/maths:main"]) == {
        "aime24": "aime24",
        "file:data/hard set.jsonl": "hard_set",
        "hub:org/maths:main": "main",
    }
    assert metric_names(["hub:org/set-v1.5"]) == {"hub:org/set-v1.5": "set_v1_5"}
    names = metric_names(["file:a/test.jsonl", "file:b/test.parquet", "ladder:long"])
    assert list(names.values()) == ["file_a_test", "file_b_test", "long"]
    with pytest.raises(ValueError, match="whose names differ"):
        metric_names(["file:a/b.json", "file:a_b.json", "file:c/a_b.json", "file:c/b.json"])


def test_a_set_without_problems_is_refused():
    task = Even()
    task.num_test = 0
    with pytest.raises(ValueError, match="held-out has no problem to evaluate on"):
        make_set("held-out", task, 5, Reward())


@pytest.mark.parametrize("scale", [(0.0, 2.0), (-1.0, 1.0), (0.0, 0.5), (-3.0, -1.0)], ids=str)
def test_verdicts_of_any_scale_have_their_accuracy(scale):
    """Right twice, once and never in two responses; partial credit between is not right."""
    wrong, right = scale
    verdicts = [(right, right), (right, wrong), (wrong, wrong + (right - wrong) / 2)]
    rows = [
        {
            "reward": own, "answers": ["a", "b"], "length": [1, 1], "truncated": [False, False],
            "logprob": [0.0, 0.0], "timed_out": [False, False], "crashed": [False, False],
        }
        for own in verdicts
    ]  # fmt: skip
    found = summarize(rows, Reward(right=right))
    assert found["avg@2"] == estimate([1.0, 0.5, 0.0], 2)._asdict()
    assert found["pass@2"]["value"] == pytest.approx(2 / 3)
    assert found["maj@2"]["value"] == pytest.approx(0.5)
    assert found["standard_error"] == pytest.approx(0.5 / 3**0.5)
    assert found["reward"] == pytest.approx(sum(map(sum, verdicts)) / 6)


def test_the_real_number_of_problems_is_told(place, tmp_path, monkeypatch):
    """Eight are held out of the 512 that are asked for by default."""
    monkeypatch.setattr(trainer.run, "make_task", lambda *_: Even())
    train(settings(tmp_path, str(place / "model"), steps=0, eval=Eval()))
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["eval/problems"] == 8
    shares = [1.0] * round(8 * row["eval/accuracy"]) + [0.0] * round(8 - 8 * row["eval/accuracy"])
    assert (row["eval/low"], row["eval/high"]) == pytest.approx(estimate(shares, 1)[1:])
