"""What a run works on, known by its contents when it goes on: data, model, verifier."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import datasets
import pytest

from tests.trainer.small import Even, save_folder, settings, use_task
from tests.trainer.test_resume import ROOT, crash, run_json
from trainer.__main__ import main
from trainer.config import Data, Reward, WarmStart
from trainer.config.files import fill
from trainer.tasks import make_task
from trainer.train import train

pytestmark = pytest.mark.usefixtures("own_cache")


def sums(path, count=40, wrong=0, **columns):
    rows = [
        {"prompt": f"{i % 10} + {i // 10} =", "answer": str(7 + (i < wrong)), **columns}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def on_sums(root, model, path, **data):
    config = settings(root, model, data=Data(task=f"file:{path}", test_fraction=0.2, **data))
    return fill(config, {"rollout.max_new_tokens": 2, "algorithm.max_rounds": 1, "steps": 4})


def test_data_is_known_by_its_contents(model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "sums.jsonl"
    sums(file)
    config = on_sums(tmp_path, model, file)
    crash(config, step=2)
    (digest,) = {start["inputs"]["data"] for start in run_json(config)["starts"]}
    assert re.fullmatch("[0-9a-f]{16}", digest)
    # Another place and form.
    datasets.Dataset.from_json(str(file)).to_parquet(str(tmp_path / "moved.parquet"))
    moved = fill(config, {"data.task": f"file:{tmp_path}/moved.parquet"})
    crash(moved, step=3)
    assert re.search(r"changed  data.task .* \(the same contents\)", capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    crash(fill(config, {"data.task": "file:./moved.parquet"}), step=3)
    assert "changed" not in capsys.readouterr().out
    # Other contents in the same place.
    sums(tmp_path / "other.jsonl", wrong=1)
    datasets.Dataset.from_json("other.jsonl").to_parquet("moved.parquet")
    before = run_json(config)
    with pytest.raises(
        ValueError,
        match=rf"data.task was file:\S+moved.parquet of digest {digest}, now of [0-9a-f]+\. .*"
        "--allow-changes data.task",
    ):
        train(moved)
    assert run_json(config) == before
    train(moved, allow_changes=["data.task"])
    assert run_json(config)["starts"][-1]["changes"].keys() == {"data.task"}
    assert run_json(config)["starts"][-1]["inputs"]["data"] != digest
    # Another file altogether.
    sums(tmp_path / "third.jsonl", count=41)
    with pytest.raises(ValueError, match=r"data.task was \S+, now file:third.jsonl\. "):
        train(fill(config, {"data.task": "file:third.jsonl"}))


def test_other_columns_are_named_and_not_their_contents(model, tmp_path):
    file = tmp_path / "sums.jsonl"
    sums(file, b="8")
    config = on_sums(tmp_path, model, file)
    crash(config, step=2)
    other = fill(config, {"data.answer_field": "b"})
    with pytest.raises(ValueError, match=r"settings: data.answer_field was answer, now b\. "):
        train(other)
    train(other, allow_changes=["data.answer_field"])


def test_the_model_and_the_verifier_are_noted(model, tmp_path, monkeypatch, capsys):
    use_task(Even())
    verifier = tmp_path / "package" / "inner" / "mine.py"  # without an __init__.py
    verifier.parent.mkdir(parents=True)
    verifier.write_text("def check(prompt, response, answer):\n    return len(response) > 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    own = save_folder(tmp_path / "model", spread=0.2)
    config = settings(tmp_path, own, steps=4, reward=Reward("package.inner.mine:check", workers=1))
    crash(config)
    inputs = run_json(config)["starts"][0]["inputs"]
    assert inputs["model"]
    assert inputs["verifier"]
    assert inputs["data"] == ""  # generated
    verifier.write_text("def check(prompt, response, answer):\n    return len(response) > 2\n")
    Path(own, "added.json").write_text("{}")
    capsys.readouterr()
    train(config)
    printed = capsys.readouterr().out
    assert re.search(r"changed  model.path .*\(the run goes on with its own weights\)", printed)
    assert re.search(r"changed  reward.function .*\(its verdicts may be others\)", printed)
    assert "package" not in sys.modules  # it is read, and run in processes of its own
    moved = fill(config, {"model.path": str(tmp_path / "moved")})
    with pytest.raises(ValueError, match=r"model.path was"):
        train(moved)
    Path(own).rename(tmp_path / "moved")
    train(moved)
    assert "(the same contents)" in capsys.readouterr().out


def test_own_prompts_with_worked_responses(model, tmp_path, monkeypatch, capsys):
    """A warm start trains on them, each behind its own prompt, and on no held-out row."""
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl", count=100, worked="7")
    config = dataclasses.replace(
        on_sums(tmp_path, model, tmp_path / "sums.jsonl", demonstration_field="worked"),
        warm_start=WarmStart(steps=2, batch_size=4),
    )
    task = make_task(config.data, 0, None)
    pairs = task.demonstrations(100, seed=config.seed)
    assert 64 < len(pairs) == task.num_train < 100
    assert pairs[:3] == task.demonstrations(3, seed=config.seed)
    assert pairs[:3] != task.demonstrations(3, seed=config.seed + 1)
    assert {response for _, response in pairs} == {"7"}
    held_out = {task.problem("test", i).prompt for i in range(task.num_test)}
    assert not held_out & {problem.prompt for problem, _ in pairs}
    train(fill(config, {"steps": 1}))
    assert "no warm start" not in capsys.readouterr().out
    assert len([*Path("runs/warm-starts").iterdir()]) == 1
    # Every row counts, not only the first ones.
    rows = (tmp_path / "sums.jsonl").read_text().splitlines()
    last = pairs[-1][0].prompt
    changed = [row.replace('"7"}', '"8"}') if f'"{last}"' in row else row for row in rows]
    assert changed != rows
    (tmp_path / "sums.jsonl").write_text("\n".join(changed))
    train(fill(config, {"steps": 1, "name": "other"}))
    assert len([*Path("runs/warm-starts").iterdir()]) == 2
    other = dataclasses.replace(config.data, demonstration_field="work")
    with pytest.raises(ValueError, match=r"row \d+: data.demonstration_field 'work' must name a"):
        make_task(other, 0, None).demonstrations(3, seed=0)


def test_own_prompts_with_the_tiny_preset(tmp_path, monkeypatch, capsys):
    """Its warm start needs demonstrations, and a file has none: it goes without, and says so."""
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    config = dataclasses.replace(
        on_sums(tmp_path, "tiny", tmp_path / "sums.jsonl"), warm_start=WarmStart(steps=600)
    )
    train(fill(config, {"steps": 1}))
    printed = capsys.readouterr().out
    assert re.search(r"no warm start: task 'file:\S+' has no demonstrations", printed)
    assert not Path(WarmStart().cache).exists()


def test_by_the_command_line(tmp_path, model, monkeypatch, capsys):
    """The command of a run that ended, with less memory and more steps."""
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    options = [
        *("--data.task", "file:sums.jsonl", "--model.path", model, "--root", "runs", "--threads=1"),
        *("--rollout.max-new-tokens", "2", "--eval.problems=2", "--rollout.prompts=4"),
        *("--algorithm.min-groups=1", "--device=cpu", "--checkpoint-every=1", "--name=a"),
    ]
    assert main(["train", *options, "--steps=2"]) == 0
    other = ["train", *options, "--steps=3", "--seed=1", "--optimizer.tokens-per-micro-batch=64"]
    capsys.readouterr()
    assert main(other) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: runs/a holds .*--allow-changes seed; .*\n", error)
    assert main([*other, "--allow-changes", "seed"]) == 0
    printed = capsys.readouterr().out
    assert "changed  seed was 0, now 1\n" in printed
    assert "changed  steps was 2, now 3\n" in printed
    start = json.loads((tmp_path / "runs" / "a" / "run.json").read_text())["starts"][-1]
    assert start["changes"].keys() == {"seed", "steps", "optimizer.tokens_per_micro_batch"}
    assert start["step"] == 2
