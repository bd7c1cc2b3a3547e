"""The sets a model is evaluated on: their columns, from the hub's loader or a local copy."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trainer.config import Data
from trainer.tasks.benchmarks import BENCHMARKS, make_benchmark

QUESTION = "What is the sum of the roots of $x^2 = 4$?"
# A row as each set has it, with columns beside those that are read.
ROWS = {
    "aime24": {"id": 60, "problem": QUESTION, "solution": "0 it is", "answer": "204", "year": "24"},
    "aime25": {"problem": QUESTION, "answer": "204", "id": "0"},
    "amc23": {"id": 0, "question": QUESTION, "answer": "204.0", "url": "aops"},
    "math500": {"problem": QUESTION, "solution": "", "answer": "204", "level": 2},
    "minerva": {"question": QUESTION, "answer": "204"},
    "olympiadbench": {"id": 1, "question": QUESTION, "final_answer": ["204"], "unit": None},
}
DATA = Data(instruction="Box it.", template="none")


pytestmark = pytest.mark.usefixtures("own_cache")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_is_the_set(task, name, count=3):
    assert task.name == name
    assert task.num_test == count
    problem = task.problem("test", count - 1)
    assert problem.prompt == f"{QUESTION}\n\nBox it."
    assert task.reward(problem, "So \\boxed{204}.") == 1.0
    assert task.reward(problem, "So \\boxed{205}.") == 0.0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_short_name_reads_its_split_and_columns_from_the_hub(name, monkeypatch):
    asked = []

    def load_dataset(hub, configuration, split):
        asked.append((hub, configuration, split))
        return Dataset.from_list([ROWS[name]] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_is_the_set(make_benchmark(name, DATA, "test", None), name)
    assert asked == [(BENCHMARKS[name].hub, None, "train" if name == "aime24" else "test")]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_local_copy_has_the_same_columns(name, kind, tmp_path):
    path = tmp_path / ("copy" if kind == "folder" else f"copy.{kind}")
    rows = Dataset.from_list([ROWS[name]] * 3)
    if kind == "jsonl":
        lines(path, [ROWS[name]] * 3)
    elif kind == "parquet":
        rows.to_parquet(str(path))
    else:
        DatasetDict({BENCHMARKS[name].split: rows, "other": rows.select([0])}).save_to_disk(path)
    assert_is_the_set(make_benchmark(f"{name}={path}", DATA, "test", None), name)


def test_any_file_has_all_its_rows_in_order_and_repeated_ones_too(tmp_path):
    rows = [{"ask": f"{i % 2}?", "reward_model": {"ground_truth": str(i)}} for i in range(5)]
    name = f"file:{lines(tmp_path / 'a=b.jsonl', rows)}"
    columns = Data(prompt_field="ask", answer_field="reward_model.ground_truth")
    task = make_benchmark(name, columns, "test", None)
    problems = [task.problem("test", i) for i in range(task.num_test)]
    assert [p.prompt for p in problems] == ["0?", "1?", "0?", "1?", "0?"]
    assert [p.answer for p in problems] == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="for evaluation: it has no split 'train'"):
        task.problem("train", 0)


def test_a_source_with_splits_gives_the_one_asked_for(tmp_path):
    splits = {
        name: Dataset.from_list([{"prompt": name, "answer": "1"}]) for name in ("dev", "test")
    }
    DatasetDict(splits).save_to_disk(tmp_path / "set")
    for split in splits:
        task = make_benchmark(f"file:{tmp_path / 'set'}", DATA, split, None)
        assert task.problem("test", 0).prompt == f"{split}\n\nBox it."
    with pytest.raises(ValueError, match=r"no split 'train'; its splits are dev, test"):
        make_benchmark(f"file:{tmp_path / 'set'}", DATA, "train", None)


@pytest.mark.parametrize(
    ("answers", "response", "reward"),
    [
        (["2", "-2"], "\\boxed{-2, 2}", 1.0),
        (["$2 \\sqrt{3}$", "$-2 \\sqrt{3}$"], "\\boxed{\\pm 2\\sqrt{3}}", 1.0),
        (["2", "-2"], "\\boxed{2}", 0.0),
        (["$(1,8,19), (2,7,13)$"], "\\boxed{(1,8,19),(2,7,13)}", 1.0),
        (["$(1,8,19), (2,7,13)$"], "\\boxed{(1,8,19)}", 0.0),
    ],
)
def test_several_answers_are_right_together(answers, response, reward, tmp_path):
    path = lines(tmp_path / "o.jsonl", [{"question": QUESTION, "final_answer": answers}])
    task = make_benchmark(f"olympiadbench={path}", DATA, "test", None)
    assert task.reward(task.problem("test", 0), response) == reward


def test_tasks_that_make_their_problems():
    assert make_benchmark("ladder", DATA, "test", None).num_test == 4096
    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    task = make_benchmark("gym:chain_sum", DATA, "test", None)
    assert "Box it." in task.problem("test", 0).prompt


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("aime26", "no data 'aime26'; wanted aime24, .*, olympiadbench"),
        ("aime24=no/such.jsonl", "aime24=no/such.jsonl cannot be read: there is no no/such"),
        ("file:no/such.jsonl", "file:no/such.jsonl cannot be read"),
        ("aime24={empty}", "empty.jsonl cannot be read: it is empty"),
        ("aime24={other}", "row 0 has nothing in column 'problem'; the columns are answer, prompt"),
        ("olympiadbench={nothing}", "row 0 has nothing in column 'final_answer'"),
    ],
)
def test_what_cannot_be_evaluated_is_said(name, says, tmp_path):
    files = {
        "empty": lines(tmp_path / "empty.jsonl", []),
        "other": lines(tmp_path / "other.jsonl", [{"prompt": "a", "answer": "b"}]),
        "nothing": lines(tmp_path / "n.jsonl", [{"question": "a", "final_answer": []}]),
    }
    with pytest.raises(ValueError, match=says):
        make_benchmark(name.format(**files), DATA, "test", None)


def test_a_hub_out_of_reach_names_the_way_around(monkeypatch):
    def load_dataset(*_, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="no network; a local copy is read as amc23=PATH"):
        make_benchmark("amc23", DATA, "test", None)
