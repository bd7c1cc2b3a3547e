"""Prompts that cannot be trained on are found at the start, by row, and not when they are drawn."""

import json
import re

import pytest

import trainer.run
from tests.trainer.small import Even, build_model, build_tokenizer, save_folder, settings
from trainer.config import Data, Engine, Rollout
from trainer.config.files import fill
from trainer.log import read_rows
from trainer.policy import Policy
from trainer.tasks import lengths, make_task
from trainer.tasks.ladder import Ladder
from trainer.tasks.lengths import Room, check_prompts
from trainer.tasks.problem import Problem
from trainer.tiny.model import build_tiny
from trainer.train import train

pytestmark = pytest.mark.usefixtures("own_cache")


LONG = (11, 23)


def prompts(path, count=40, long=LONG, **other):
    """Rows of 4 tokens with the answer 7; those of `long` have 60, and `other` are by row."""
    texts = [f"{i % 10} + {i // 10} =" + " 1" * (56 if i in long else 0) for i in range(count)]
    for row, text in other.items():
        texts[int(row.removeprefix("row"))] = text
    path.write_text("".join(json.dumps({"prompt": t, "answer": "7"}) + "\n" for t in texts))


def data_of(tmp_path, longest=0):
    return Data(f"file:{tmp_path}/a.jsonl", test_fraction=0.2, max_prompt_tokens=longest)


def made(tmp_path, tokenizer=None):
    return make_task(data_of(tmp_path), 0, tokenizer or build_tokenizer())


def test_what_is_too_long_for_the_model_ends_the_start(tmp_path):
    """One such row used to end a run at the step that drew it, for ever."""
    prompts(tmp_path / "a.jsonl")
    model = save_folder(tmp_path / "model")
    config = settings(tmp_path, model, data=data_of(tmp_path))
    says = (
        r"a.jsonl: 2 of 40 prompts are longer than the 58 tokens that rollout.max_new_tokens of 6 "
        r"leaves of the model's 64 positions; the longest, row 23 of train, has 62\. Lower "
        r"rollout.max_new_tokens, or leave them out by --data.max-prompt-tokens 58$"
    )
    with pytest.raises(ValueError, match=says):
        train(config)
    assert not (tmp_path / "run").exists()


def test_longer_ones_are_left_out_where_asked(tmp_path, capsys):
    prompts(tmp_path / "a.jsonl")
    model = save_folder(tmp_path / "model")
    config = settings(tmp_path, model, data=data_of(tmp_path, 40))
    config = fill(config, {"steps": 5, "rollout.max_new_tokens": 2})
    train(config)
    printed = capsys.readouterr().out
    for split in ("train", "test"):
        assert f"left out of {split}: 1 prompts over data.max_prompt_tokens" in printed
    counts = re.search(r"data +\S+: (\d+) to train on, (\d+) held out", printed)
    assert counts
    assert int(counts[1]) + int(counts[2]) == 40 - len(LONG)
    assert "repeat" not in printed
    start = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]
    assert start["left_out"] == {"train": 1, "test": 1}
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5


def test_each_epoch_is_all_that_is_left(tmp_path):
    prompts(tmp_path / "a.jsonl")
    task = made(tmp_path)
    assert check_prompts(task, build_tokenizer(), None, 20) == {"train": 1, "test": 1}
    held_out = {task.problem("test", i).prompt for i in range(task.num_test)}
    count = 40 - len(LONG) - task.num_test
    for epoch in range(2):
        asked = {task.problem("train", epoch * count + i).prompt for i in range(count)}
        assert len(asked) == count
        assert not asked & held_out
        assert all(len(text.split()) < 20 for text in asked)


def test_held_out_ones_are_left_out_too(tmp_path):
    prompts(tmp_path / "a.jsonl", long=range(0, 40, 2))
    task = made(tmp_path)
    before = task.num_test
    left_out = check_prompts(task, build_tokenizer(), None, 20)
    assert 0 < left_out["test"] == before - task.num_test
    assert all(len(task.problem("test", i).prompt.split()) < 20 for i in range(task.num_test))
    prompts(tmp_path / "a.jsonl", long=range(40))
    says = "all 3. prompts of train are longer than data.max_prompt_tokens=20; the shortest has 60"
    with pytest.raises(ValueError, match=says):
        check_prompts(made(tmp_path), build_tokenizer(), None, 20)


@pytest.mark.parametrize("batch", [1, 7, 1024])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "row 5 has nothing in column 'prompt'"),
        ("  ", "a.jsonl: row 5 of train: a prompt must have tokens to continue; got '  '"),
    ],
)
def test_a_row_without_a_token_is_named(tmp_path, monkeypatch, text, says, batch):
    monkeypatch.setattr(lengths, "_BATCH", batch)
    prompts(tmp_path / "a.jsonl", row5=text)
    with pytest.raises(ValueError, match=says):
        check_prompts(made(tmp_path), build_tokenizer(), None, 0)


def test_a_row_that_the_tokenizer_cannot_encode_is_named(tmp_path):
    """The tiny model's has no token for letters, and none for what it does not know."""
    tokenizer = build_tiny(0)[1]
    prompts(tmp_path / "a.jsonl", row8="What is 1 + 1?")
    says = "row 8 of test: the tokenizer cannot encode 'What is 1 [+] 1[?]': .*UNK.* model.path"
    with pytest.raises(ValueError, match=says):
        check_prompts(made(tmp_path, tokenizer), tokenizer, None, 0)


def test_a_row_that_the_template_cannot_render_is_named(tmp_path):
    template = (
        "{% if '7' in messages[0]['content'] %}{{ raise_exception('no sevens') }}{% endif %}1"
    )
    tokenizer = build_tokenizer(chat_template=template)
    prompts(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl: row 7: no prompt: .*no sevens"):
        check_prompts(made(tmp_path, tokenizer), tokenizer, None, 0)


@pytest.mark.parametrize(
    ("longest", "new", "tokens", "limit"),
    [
        (0, 6, 58, "the model's 64 positions"),
        (32, 6, 26, "engine.max_model_len of 32"),
        (99, 6, 58, "the model's 64 positions"),
        (0, 64, 0, "the model's 64 positions"),
    ],
)
def test_room_is_what_the_response_leaves(tmp_path, longest, new, tokens, limit):
    engine = Engine(max_model_len=longest)
    config = settings(tmp_path, engine=engine, rollout=Rollout(max_new_tokens=new))
    policy = Policy(build_model(), build_tokenizer(), engine.max_model_len)
    room = Room.of(policy.longest, config)
    assert room == Room(tokens, f"rollout.max_new_tokens of {new} leaves of {limit}")
    if tokens < 1:
        with pytest.raises(ValueError, match=r"no prompt fits into the 0 tokens that rollout\."):
            check_prompts(Even(), build_tokenizer(), room, 0)


def test_a_model_without_a_limit_has_room(tmp_path):
    model = build_model("bloom")
    del model.config.max_position_embeddings
    assert Room.of(Policy(model, build_tokenizer()).longest, settings(tmp_path)) is None


class Long(Even):
    """The held-out problem 3 has 60 tokens."""

    def problem(self, split, index):
        return Problem("1 " * (60 if (split, index) == ("test", 3) else 2), None)


def test_the_first_problems_of_an_endless_task(tmp_path, monkeypatch):
    says = (
        r"even: 1 of 264 prompts are .* the longest, problem 3 of test, has 60\. Lower "
        r"rollout.max_new_tokens$"
    )
    monkeypatch.setattr(trainer.run, "make_task", lambda *_: Long())
    with pytest.raises(ValueError, match=says):
        train(settings(tmp_path, save_folder(tmp_path / "model")))
    assert not (tmp_path / "run").exists()
    assert check_prompts(Ladder(0), build_tiny(0)[1], Room(12, ""), 0) == {}
    with pytest.raises(ValueError, match=r"ladder: \d+ of 512 prompts are longer than the 3 "):
        check_prompts(Ladder(0), build_tiny(0)[1], Room(3, "x"), 0)


def test_the_option_itself_is_kept(tmp_path):
    """Another order of the data than before, so it needs leave."""
    prompts(tmp_path / "a.jsonl")
    config = settings(tmp_path, save_folder(tmp_path / "model"), data=data_of(tmp_path, 40))
    config = fill(config, {"steps": 1, "rollout.max_new_tokens": 2})
    train(config)
    other = fill(config, {"data.max_prompt_tokens": 30, "steps": 2})
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens was 40, now 30"):
        train(other)
    train(other, allow_changes=["data.max_prompt_tokens"])
    assert re.search("left_out", (tmp_path / "run" / "run.json").read_text())
