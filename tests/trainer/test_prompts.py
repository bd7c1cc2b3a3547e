"""Prompt sets: reading, splitting, rendering and scoring them."""

import json
from decimal import Decimal

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from trainer.config import Data
from trainer.tasks import make_task
from trainer.tasks.benchmarks import make_benchmark
from trainer.tasks.render import render
from trainer.tasks.sources import answer_text

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]
NESTED = [
    {
        "data_source": "math",
        "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
        "reward_model": {"ground_truth": str(2 * i), "style": "rule"},
    }
    for i in range(200)
]


pytestmark = pytest.mark.usefixtures("own_cache")


class ChatTokenizer:
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        turns = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return turns + "<assistant>"


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"


def write(kind, tmp_path, rows) -> str:
    if kind == "jsonl":
        return write_lines(tmp_path / "set.jsonl", rows)
    path = tmp_path / ("set.parquet" if kind == "parquet" else "set")
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(str(path)) if kind == "parquet" else dataset.save_to_disk(str(path))
    return f"file:{path}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize("rows", [ROWS, NESTED], ids=["flat", "nested"])
def test_every_form_gives_the_same_problems(kind, rows, tmp_path):
    field = "answer" if rows is ROWS else "reward_model.ground_truth"
    source = write(kind, tmp_path, rows)
    task = make_task(Data(task=source, answer_field=field, test_fraction=0.2), 0)
    assert task.name == source
    test = [task.problem("test", i) for i in range(task.num_test)]
    train = [task.problem("train", i) for i in range(200 - task.num_test)]
    assert 20 <= task.num_test <= 60
    assert {p.prompt for p in train + test} == {row["prompt"] for row in ROWS}
    for problem in train + test:
        number = int(problem.prompt.split()[2])
        assert problem.answer == str(2 * number)
        assert task.reward(problem, f"It is \\boxed{{{2 * number}}}.") == 1.0
        assert task.reward(problem, f"It is \\boxed{{{2 * number + 1}}}.") == 0.0


def test_order_is_fixed_by_seed_and_index(tmp_path):
    data = Data(task=write("jsonl", tmp_path, ROWS))
    task, again, other = make_task(data, 0), make_task(data, 0), make_task(data, 1)
    size = 200 - task.num_test
    epochs = [[task.problem("train", e * size + i).prompt for i in range(size)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert again.problem("train", size + 7).prompt == epochs[1][7]
    assert [other.problem("train", i).prompt for i in range(size)] != epochs[0]
    assert other.problem("test", 3) == task.problem("test", 3)


def test_test_split_is_held_out_and_leaves_train(tmp_path):
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:7])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    task = make_task(Data(task=f"file:{tmp_path / 'set'}"), 0)
    assert task.num_test == 7
    test = {task.problem("test", i).prompt for i in range(7)}
    assert test == {row["prompt"] for row in ROWS[:7]}
    assert not test & {task.problem("train", i).prompt for i in range(193)}


def test_hub_names_and_configurations(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration))
        return DatasetDict(train=Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    make_task(Data(task="hub:someone/sums"), 0)
    make_task(Data(task="hub:someone/sums:main"), 0)
    assert asked == [("someone/sums", None), ("someone/sums", "main")]


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*_, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="hub:someone/sums cannot be read: no network"):
        make_task(Data(task="hub:someone/sums"), 0)


def test_repeated_prompts_count_once(tmp_path):
    task = make_task(Data(task=write("jsonl", tmp_path, ROWS * 3), test_fraction=0.5), 0)
    test = [task.problem("test", i).prompt for i in range(task.num_test)]
    assert len(set(test)) == len(test) < 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("\n\n", "cannot be read"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"prompt": "a", "answer": "1"}\n7\n', "line 2 is not a JSON object"),
        (
            '{"question": "a", "answer": "1"}\n',
            "row 0 has nothing in column 'prompt'; the columns are answer, question",
        ),
        (
            '{"problem": "a", "solution": "1"}\n',
            "row 0 has nothing in column 'prompt'; the columns are problem, solution",
        ),
        (
            '{"prompt": "a", "info": {"gold": "1"}}\n',
            "nothing in column 'answer'; the columns are info, info.gold, prompt",
        ),
        (
            '{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n',
            "row 1 has nothing in column 'answer'",
        ),
        (
            '{"prompt": "a", "answer": [{"b": 1}]}\n',
            "column 'answer' must hold text, finite numbers or lists of them; got {'b': 1}",
        ),
        (
            '{"prompt": "a", "answer": 1.5}\n{"prompt": "b", "answer": NaN}\n',
            "row 1: column 'answer' must hold text, finite numbers or lists of them; got nan",
        ),
        (
            '{"prompt": "a", "answer": "1"}\n',
            "to hold out; both need 1, and data.test_fraction is",
        ),
    ],
    ids=lambda text: text[:50],
)
def test_bad_files_are_named(content, message, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        make_task(Data(task=f"file:{path}"), 0)
    assert str(path) in str(raised.value)


def test_other_bad_sources(tmp_path):
    (tmp_path / "set.parquet").write_text("nope")
    (tmp_path / "set.txt").write_text("nope")
    with pytest.raises(ValueError, match=r"set\.txt cannot be read: wanted a folder"):
        make_task(Data(task=f"file:{tmp_path / 'set.txt'}"), 0)
    for path in (tmp_path, tmp_path / "set.parquet", tmp_path / "missing.jsonl"):
        with pytest.raises(ValueError, match="cannot be read"):
            make_task(Data(task=f"file:{path}"), 0)
    splits = DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS))
    splits.save_to_disk(str(tmp_path / "named"))
    with pytest.raises(ValueError, match='no split "train"; its splits are a, b'):
        make_task(Data(task=f"file:{tmp_path / 'named'}"), 0)
    with pytest.raises(ValueError, match=r"test_fraction must lie between 0 and 1, not 1\.5"):
        make_task(Data(task=write("jsonl", tmp_path, ROWS), test_fraction=1.5), 0)


def test_render():
    data, plain = Data(instruction="Think."), Data(template="none")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    tokenizer = ChatTokenizer()
    assert render(tokenizer, "Hi", data) == "<user>Hi\n\nThink.<assistant>"
    assert render(tokenizer, chat, data) == "<system>Be brief.<user>Hi\n\nThink.<assistant>"
    assert render(tokenizer, "Hi", plain) == render(None, "Hi", Data()) == "Hi"
    assert render(None, chat[1:], plain) == "Hi"
    assert chat[1]["content"] == "Hi"
    own = Data(template="Q: {question}\n\\boxed{} A:", instruction="Think.")
    assert render(tokenizer, chat[1:], own) == "Q: Hi\n\nThink.\n\\boxed{} A:"
    assert render(None, "{question}", Data(template="{question}{question}")) == "{question}" * 2
    with pytest.raises(ValueError, match="2 chat messages"):
        render(tokenizer, chat, own)
    with pytest.raises(ValueError, match=r"a text with {question} in it; got 'chatml'"):
        Data(template="chatml")
    with pytest.raises(ValueError, match="2 chat messages needs a tokenizer with a chat template"):
        render(tokenizer, chat, plain)
    for prompt in (7, [], [{"role": "user"}], ["Hi"], [{"role": "user", "content": [1]}]):
        with pytest.raises(ValueError, match="chat message"):
            render(tokenizer, prompt, data)


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ([0.00001, 1e-7], "10^{-7}, 10^{-5}", "10^{-5}"),
        (0.00001, "10^{-5}", "10^{-6}"),
        (5e-324, "5\\times10^{-324}", "0"),
        (1e22, "10^{22}", "10^{21}"),
        (2**53 + 1, "9007199254740993", "9007199254740992"),
        (-3, "-3", "3"),
        (0.1 + 0.2, "0.3", "0.300001"),
        (34.0, "34", "34.1"),
        (True, "\\text{true}", "1"),
        (["2", "-2"], "\\pm 2", "2"),
    ],
    ids=repr,
)
def test_answers_of_json_are_golds(answer, right, wrong, tmp_path):
    """In training as in evaluation; a list of answers is right together."""
    source = write_lines(tmp_path / "set.jsonl", [row | {"answer": answer} for row in ROWS])
    for task in (make_task(Data(task=source), 0), make_benchmark(source, Data(), "train", None)):
        problem = task.problem("test", 0)
        assert task.reward(problem, f"\\boxed{{{right}}}") == 1.0, problem.answer
        assert task.reward(problem, f"\\boxed{{{wrong}}}") == 0.0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (Decimal("18.90"), "18.90"),
        ((1, "x"), "1, x"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_answers_of_other_sources(answer, text):
    assert answer_text(answer) == text


@pytest.mark.parametrize("answer", [None, {}, 1j, float("inf"), Decimal("nan"), b"1", [[None]]])
def test_what_is_no_answer(answer):
    with pytest.raises(ValueError, match="must hold text, finite numbers or lists of them; got"):
        answer_text(answer)
