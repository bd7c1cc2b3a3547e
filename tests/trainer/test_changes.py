"""What a run keeps and what may differ: every setting is one or the other."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.config import Config, Data, Model, Optimizer, Rollout, WarmStart
from trainer.config.changes import FREE, KEPT, differences, effect, known_names
from trainer.config.files import leaves


def test_every_setting_is_kept_or_free():
    """One that is new belongs into one of the tables of trainer/config/changes.py."""
    names = set(leaves())
    groups = {name.partition(".")[0] for name in names}
    assert names >= KEPT
    assert names | groups >= FREE.keys()
    for name in names:
        free = name in FREE or name.partition(".")[0] in FREE
        assert free != (name in KEPT), name
        assert (effect(name) is None) == (name in KEPT), name


def test_what_an_out_of_memory_wants_to_change_is_free():
    for name in (
        *("optimizer.tokens_per_micro_batch", "rollout.batch_size", "engine.memory_utilization"),
        *("model.gradient_checkpointing", "model.attention", "threads", "device", "steps"),
        *("reward.workers", "engine.devices", "eval.problems", "checkpoint_every"),
    ):
        assert effect(name) is not None
    for name in ("seed", "data.task", "algorithm.fraction", "rollout.max_new_tokens", "no.such"):
        assert effect(name) is None
    assert "random numbers" in (effect("engine.kind") or "")


def test_the_documentation_has_all_that_is_free():
    """Each in the row of what comes of it."""
    page = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    table = page.partition("what follows from another value |")[2].partition("\n\n")[0]
    rows = dict.fromkeys(line.strip("| ").split(" | ")[-1] for line in table.splitlines()[2:])
    for name, comes_of_it in FREE.items():
        group = name if name in leaves() else f"{name}.*"
        row = next(line for line in table.splitlines() if re.search(rf"`{re.escape(group)}`", line))
        assert row.endswith(f"| {comes_of_it or 'nothing in the run'} |"), name
    assert rows.keys() == {text or "nothing in the run" for text in FREE.values()}


def found(before, now, directory=Path()):
    return {change.name: change for change in differences(before, now, directory)}


def test_differences_are_named_with_what_was_and_is():
    before = asdict(Config())
    now = replace(Config(), rollout=Rollout(prompts=4), optimizer=Optimizer(betas=(0.5, 0.9)))
    assert {name: str(change) for name, change in found(before, now).items()} == {
        "rollout.prompts": "rollout.prompts was 32, now 4",
        "optimizer.betas": "optimizer.betas was [0.9, 0.95], now [0.5, 0.9]",
    }
    assert not found(before, Config())


def test_a_setting_that_was_not_there_yet_had_its_default():
    before = asdict(Config())
    del before["data"]["max_prompt_tokens"], before["keep_every"]
    before["eval_every"] = 20  # no setting any more
    assert not found(before, Config())
    now = replace(Config(), data=Data(max_prompt_tokens=9))
    assert str(found(before, now)["data.max_prompt_tokens"]).endswith("was 0, now 9")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("data.task", lambda path: Config(data=Data(task=f"file:{path}"))),
        ("model.path", lambda path: Config(model=Model(path=str(path)))),
        ("warm_start.cache", lambda path: Config(warm_start=WarmStart(cache=str(path)))),
        ("root", lambda path: Config(root=str(path))),
    ],
)
def test_the_same_place_by_another_path_is_no_change(tmp_path, monkeypatch, name, make):
    monkeypatch.chdir(tmp_path)
    before = asdict(make("data/x.jsonl"))
    for path in ("./data/x.jsonl", "data/../data/x.jsonl", tmp_path / "data" / "x.jsonl"):
        assert not found(before, make(path))
    assert found(before, make("data/y.jsonl")).keys() == {name}
    # Started elsewhere: what was relative stays where it was, or all has moved together.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not found(before, make("../data/x.jsonl"), tmp_path)
    assert found(before, make("../x.jsonl"), tmp_path).keys() == {name}
    assert not found(before, make("data/x.jsonl"), tmp_path)


def test_a_hub_set_is_no_path_and_tiny_no_folder():
    assert found(asdict(Config(data=Data(task="hub:a"))), Config(data=Data(task="hub:./a")))
    assert found(asdict(Config(data=Data(task="file:a"))), Config(data=Data(task="hub:a")))
    assert found(asdict(Config()), Config(model=Model(path="./tiny")))


def test_what_is_allowed_must_be_a_setting_or_a_group():
    names = ["rollout.max-new-tokens", "algorithm", "seed"]
    assert known_names(names) == ("rollout.max_new_tokens", "algorithm", "seed")
    with pytest.raises(ValueError, match=r"no setting 'max_new_tokens' .*rollout.max_new_tokens"):
        known_names(["max_new_tokens"])
    with pytest.raises(ValueError, match="no setting 'roll'"):
        known_names(["roll"])
    with pytest.raises(ValueError, match=r"no setting 'algoritm' to be changed.*: algorithm$"):
        known_names(["algoritm"])
