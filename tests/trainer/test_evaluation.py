"""Evaluating a model: what is kept, what it says, and that a stopped evaluation goes on."""

import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trainer.evaluation.answers
import trainer.run
from tests.trainer.small import Even, save_folder, settings, use_task
from tests.trainer.worlds import run_ranks
from trainer.__main__ import main
from trainer.checkpoint.export import export
from trainer.evaluation.command import INSTRUCTION, Evaluation, evaluate_model
from trainer.evaluation.estimates import estimate
from trainer.train import train

SAMPLES = 4


@pytest.fixture(autouse=True)
def _here(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Random weights that end a response often, and have an answer now and then."""
    return save_folder(tmp_path_factory.mktemp("model"), spread=0.6)


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> str:
    """Ten questions whose answer is 4."""
    rows = [{"question": f"{i} + {4 - i} =", "answer": "4"} for i in range(10)]
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"amc23={path}"


@pytest.fixture
def asked(model, sums, tmp_path) -> Evaluation:
    return Evaluation(
        model,
        (sums,),
        samples=SAMPLES,
        max_new_tokens=2,
        batch_size=3 * SAMPLES,
        instruction="",
        out=str(tmp_path / "out"),
        device="cpu",
    )


def lines(folder) -> list[dict]:
    text = (Path(folder) / "generations.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def texts(folder):
    return [
        (row["data"], row["problem"], [(r["text"], r["reward"]) for r in row["responses"]])
        for row in lines(folder)
    ]


def test_generations_are_kept_and_say_what_the_results_say(asked):
    path = evaluate_model(asked)
    rows, results = lines(asked.out), json.loads(path.read_text())
    assert [row["problem"] for row in rows] == list(range(10))
    assert rows[3]["prompt"] == "<user> 3 + 1 = <assistant>"
    assert rows[3]["answer"] == "4"
    responses = [response for row in rows for response in row["responses"]]
    assert len(responses) == 10 * SAMPLES
    for response in responses:
        assert len(response["text"].split()) <= response["length"] - (not response["truncated"])
        assert response["length"] == 2 or not response["truncated"]
        assert response["logprob"] < 0
    found = results["sets"]["amc23"]
    accuracy = [statistics.fmean(r["reward"] for r in row["responses"]) for row in rows]
    assert 0 < statistics.fmean(accuracy) < 1
    assert found["avg@4"] == estimate(accuracy, SAMPLES)._asdict() == found["pass@1"]
    some = [float(any(r["reward"] for r in row["responses"])) for row in rows]
    assert found["pass@4"]["value"] == pytest.approx(statistics.fmean(some))
    assert found["pass@1"]["value"] < found["pass@2"]["value"] < found["pass@4"]["value"]
    lengths = [response["length"] for response in responses]
    assert found["length"]["mean"] == pytest.approx(statistics.fmean(lengths))
    assert found["length"]["p50"] == statistics.median(lengths)
    assert found["length"]["max"] == max(lengths)
    assert 0 < found["truncated"] == statistics.fmean(r["truncated"] for r in responses) < 1
    assert 0.1 < found["entropy"] < 3.1  # ln of the vocabulary's 17 words and 3 is 3.0
    assert results["settings"]["max_new_tokens"] == 2
    assert results["made"]["versions"]["torch"] == torch.__version__


def test_a_stopped_evaluation_goes_on_as_if_it_had_not(asked, tmp_path, monkeypatch):
    """Killed within a line, and again within a portion; portions of another size make no odds."""
    evaluate_model(asked)
    whole = texts(asked.out)
    other = replace(asked, out=str(tmp_path / "other"))
    path = Path(other.out) / "generations.jsonl"
    real, calls = trainer.evaluation.answers.sample, []

    def dies(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options["first"])
        return real(*arguments, **options)

    monkeypatch.setattr(trainer.evaluation.answers, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(other)
    assert texts(other.out) == whole[:6]
    assert not (Path(other.out) / "results.json").exists()
    os.truncate(path, path.stat().st_size - 20)
    calls[:] = [None]
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(replace(other, batch_size=1))
    assert calls[1:] == [5]
    assert texts(other.out) == whole[:6]
    monkeypatch.setattr(trainer.evaluation.answers, "sample", real)
    evaluate_model(other)
    assert texts(other.out) == whole
    sets = [json.loads((Path(x.out) / "results.json").read_text())["sets"] for x in (asked, other)]
    assert sets[0]["amc23"].pop("entropy") == pytest.approx(sets[1]["amc23"].pop("entropy"))
    assert sets[0] == sets[1]


def test_a_finished_one_samples_nothing_and_more_data_is_added(asked, monkeypatch, sums, capsys):
    evaluate_model(asked)
    before = texts(asked.out)
    copy = sums.replace("amc23", "minerva")
    path = evaluate_model(replace(asked, data=(sums, copy)))
    assert texts(asked.out)[: len(before)] == before
    assert [row["data"] for row in lines(asked.out)] == ["amc23"] * 10 + ["minerva"] * 10
    # Another set has other random numbers.
    assert [row[2] for row in texts(asked.out)[10:]] != [row[2] for row in before]
    results = json.loads(path.read_text())
    parts = [results["sets"][name]["avg@4"]["value"] for name in ("amc23", "minerva")]
    assert results["average"]["avg@4"]["value"] == pytest.approx(statistics.fmean(parts))
    assert results["average"]["problems"] == 20
    printed = capsys.readouterr().out
    for words in ("acc@4", "95% interval", "len@4", "pass@2", "maj@4", "minerva", "average"):
        assert words in printed
    assert f"{parts[1]:.2%}" in printed
    monkeypatch.delattr(trainer.evaluation.answers, "sample")
    assert json.loads(evaluate_model(asked).read_text())["sets"].keys() == {"amc23"}
    few = json.loads(evaluate_model(replace(asked, problems=4)).read_text())
    assert few["sets"]["amc23"]["problems"] == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 0.5}, "temperature was 1.0, now 0.5. Choose another --out"),
        ({"samples": 2}, "samples was 4, now 2"),
        ({"seed": 1, "instruction": "Box it."}, "instruction was '', now 'Box it.'; seed was 0"),
    ],
)
def test_other_settings_do_not_go_into_the_same_folder(asked, changes, says):
    evaluate_model(replace(asked, problems=1))
    kept = lines(asked.out)
    with pytest.raises(ValueError, match=f"holds an evaluation with other settings: {says}"):
        evaluate_model(replace(asked, **changes))
    assert lines(asked.out) == kept


def test_other_problems_under_the_same_name_are_noticed(asked, tmp_path):
    evaluate_model(replace(asked, problems=3))
    (tmp_path / "changed.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n' * 5)
    with pytest.raises(ValueError, match="has another problem 0 of amc23"):
        evaluate_model(replace(asked, data=("amc23=changed.jsonl",)))


def test_greedy_has_no_entropy_to_estimate(asked):
    results = json.loads(evaluate_model(replace(asked, temperature=0, samples=2)).read_text())
    found = results["sets"]["amc23"]
    assert found["pass@1"] == found["pass@2"] == found["maj@2"]
    assert "entropy" not in found


def test_what_the_verifier_fails_on_is_wrong_and_counted(asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_verifier.py").write_text(
        "def judge(prompt, response, answer):\n    return 1 / len(response.split())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = replace(asked, function="own_verifier:judge", workers=1)
    found = json.loads(evaluate_model(own).read_text())["sets"]["amc23"]
    responses = [response for row in lines(asked.out) for response in row["responses"]]
    empty = [response["text"].split() == [] for response in responses]
    assert [response["crashed"] for response in responses] == empty
    assert found["crashes"] == sum(empty) > 0
    assert found["timeouts"] == 0
    told = f"warning: amc23: the verifier crashed on {sum(empty)} of 40 responses; these count as "
    assert told in capsys.readouterr().out
    # Partial credit is not right.
    right = [len(response["text"].split()) == 1 for response in responses]
    assert found["avg@4"]["value"] == pytest.approx(statistics.fmean(right))


def test_a_run_is_evaluated_as_it_was_trained(model, sums, tmp_path, monkeypatch):
    """Its last checkpoint, with its template, instruction and length limit."""
    monkeypatch.setattr(trainer.run, "make_task", None)
    use_task(Even())
    config = settings(tmp_path / "runs", model, steps=2)
    data = replace(config.data, instruction="9", template="{question} 5")
    train(replace(config, data=data))
    folder = tmp_path / "runs" / "run"
    path = evaluate_model(Evaluation(str(folder), (sums,), samples=2, device="cpu"))
    assert path.parent.parent == Path("evaluations")
    assert "step-000002" in path.parent.name
    assert lines(path.parent)[0]["prompt"] == "0 + 4 =\n\n9 5"
    used = json.loads(path.read_text())["settings"]
    assert (used["max_new_tokens"], used["instruction"]) == (6, "9")
    assert used["model"].endswith("step-000002")
    # Its policy as a folder, and the checkpoint itself, say the same.
    exported = export(folder, Path("exported"))
    same = replace(Evaluation(str(exported), (sums,), samples=2, device="cpu"), max_new_tokens=6)
    same = replace(same, instruction="9", template="{question} 5")
    for model in (str(exported), used["model"]):
        other = evaluate_model(replace(same, model=model, out=f"again-{Path(model).name}"))
        assert texts(other.parent) == texts(path.parent)
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.rename(folder / checkpoint.name)
    with pytest.raises(ValueError, match=r"has no checkpoint$"):
        evaluate_model(Evaluation(str(folder), (sums,)))


def test_the_template_of_the_paper_has_the_instruction_in_it(asked):
    paper = replace(asked, template="paper", instruction="auto", problems=1)
    evaluate_model(paper)
    assert lines(asked.out)[0]["prompt"] == (
        "User:\n0 + 4 =\nPlease reason step by step, and put your final answer within \\boxed{}."
        "\n\nAssistant:\n"
    )


def test_without_a_run_the_limit_is_what_the_positions_leave(asked):
    limit = replace(asked, max_new_tokens=0, problems=1, samples=1, instruction="auto")
    settings = json.loads(evaluate_model(limit).read_text())["settings"]
    assert settings["instruction"] == INSTRUCTION
    # 64, less <user>, "0 + 4 =", the instruction's 12 words and <assistant>.
    assert settings["max_new_tokens"] == 64 - 1 - 4 - 12 - 1


def test_the_ladder_from_the_command_line(capsys):
    command = "evaluate --model tiny --data ladder --samples 2 --problems 3 --max-new-tokens 8"
    assert main(command.split()) == 0
    assert "results: evaluations/tiny/results.json" in capsys.readouterr().out
    rows = lines("evaluations/tiny")
    assert [row["problem"] for row in rows] == [0, 1, 2]
    assert set(rows[0]["answer"]) == {"start", "goal", "operands"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model no/such/folder --data ladder", "from model.path 'no/such/folder'"),
        ("--model tiny --data aime26", "no data 'aime26'; wanted aime24"),
        ("--model tiny --data ladder --data ladder", "each set once; got ['ladder', 'ladder']"),
        ("--model tiny", "tiny is neither a run nor a checkpoint of one"),
        ("--model tiny --data held-out", "held-out problems of its own; got ['held-out']"),
        ("--model tiny --data aime24=none.jsonl", "cannot be read: there is no none.jsonl"),
        ("--model tiny --data ladder --samples 0", "samples must be at least 1; got 0"),
        ("--model tiny --data ladder --temperature -1", "temperature must be at least 0; got -1.0"),
        ("--model tiny --data ladder --max-new-tokens 999", "do not fit into the model's 128"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, says, capsys):
    try:
        status = main(["evaluate", *arguments.split()])
    except SystemExit as stopped:
        status = stopped.code
    assert status in (1, 2)
    assert says in " ".join(capsys.readouterr().err.split()).replace(" │ ", " ")


def test_two_ranks_sample_what_one_does(tmp_path):
    out = [str(tmp_path / name) for name in ("one", "two")]
    one = Evaluation("tiny", ("ladder",), samples=3, problems=5, max_new_tokens=6, out=out[0])
    evaluate_model(one)
    run_ranks(2, evaluate_model, tmp_path / "ranks", replace(one, out=out[1], batch_size=9))
    assert texts(out[1]) == texts(out[0])
