"""What a run says at its start."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict

from tests.trainer.small import Even, build_policy, save_folder, settings, use_task
from trainer.config import Data, Eval
from trainer.launch.notes import say_parts
from trainer.ranks import Ranks
from trainer.tasks import make_task
from trainer.tasks.benchmarks import make_benchmark
from trainer.train import train

ALONE = Ranks(torch.device("cpu"))


def test_a_run_says_what_it_does(tmp_path, capsys):
    """Every line of a fresh start, of a resumed one, and of a run that is done already."""
    config = settings(tmp_path, save_folder(tmp_path / "model"), steps=2)
    folder = tmp_path / "run"
    use_task(Even())
    train(config)
    said = capsys.readouterr()
    assert said.out.splitlines()[:5] == [
        f"run      {folder}: metrics.jsonl, samples.jsonl, report.html",
        "start    fresh, 2 steps",
        f"model    {tmp_path}/model (LlamaForCausalLM), 0.01 M parameters, float32, 64 positions",
        "data     ladder: endless to train on, 8 held out",
        "devices  1 process x cpu, sampling with transformers",
    ]
    assert said.out.splitlines()[5].startswith("RL 0/2  accuracy ")
    assert said.err.splitlines()[-1] == (
        "warning: an accuracy on 4 held-out problems has a standard error of up to 25 points"
    )
    train(replace(config, steps=4))
    found = folder / "checkpoints" / "step-000002"
    assert f"start    resuming at step 2 of 4 ({found})\n" in capsys.readouterr().out
    train(replace(config, steps=4))
    found = folder / "checkpoints" / "step-000004"
    done = f"start    all 4 steps are done ({found}); a larger --steps goes on\n"
    assert done in capsys.readouterr().out


def said_of(capsys, policy=None, task=None, ranks=ALONE, **changes):
    """The lines of model, data and devices, and the warnings."""
    task = task or SimpleNamespace(num_train=49, num_test=1)
    policy = policy or build_policy()
    policy.layout = "rows"
    say_parts(replace(settings(""), **changes), policy, task, ranks, {}, [])
    said = capsys.readouterr()
    return said.out.splitlines(), said.err.splitlines()


def test_it_warns_of_too_few_problems(capsys):
    lines, warnings = said_of(capsys, eval=Eval(3, 512))
    assert lines[1] == "data     ladder: 49 to train on, 1 held out"
    assert warnings == [
        "warning: eval.problems is 512; held out: 1",
        "warning: an accuracy on 1 held-out problem has a standard error of up to 50 points",
    ]
    for count, warned in ((99, True), (100, False)):
        task = SimpleNamespace(num_train=None, num_test=4096)
        assert bool(said_of(capsys, task=task, eval=Eval(3, count))[1]) == warned


def test_it_tells_what_is_trained_and_how_it_computes(capsys):
    policy = build_policy("llama")
    policy.model.get_output_embeddings().requires_grad_(False)
    config = settings("").model
    model = replace(config, compute_dtype="bfloat16")
    lines, _ = said_of(capsys, policy, model=model, ranks=Ranks(torch.device("cpu"), 0, 4))
    assert re.search(r"0\.01 M parameters, 0\.00 M of them trained", lines[0])
    assert "float32, computing in bfloat16, 64 positions" in lines[0]
    assert lines[2] == "devices  4 ranks x cpu, sampling with transformers"


def test_the_first_rank_alone_says_it(capsys):
    assert said_of(capsys, ranks=Ranks(torch.device("cpu"), 1, 2)) == ([], [])


def test_a_kept_warm_start_is_told(tmp_path, capsys):
    config = settings(tmp_path, steps=0)
    warm = replace(config.warm_start, steps=2, traces=20, cache=str(tmp_path / "kept"))
    use_task(make_task(Data(), 3))
    for name, told in (("one", False), ("other", True)):
        train(replace(config, name=name, warm_start=warm))
        (kept,) = (tmp_path / "kept").iterdir()
        said = capsys.readouterr().out
        assert (f"warm start: reused from an earlier run, {kept}" in said) == told


@pytest.mark.parametrize("name", ["ladder", "ladder:long", "gym:basic_arithmetic"])
def test_tasks_without_end_say_so(name):
    if name.startswith("gym"):
        pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    assert make_task(Data(name), 0, None).num_train is None


def test_prompt_sets_say_how_many_they_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    task = make_task(Data(f"file:{path}", test_fraction=0.2), 0, None)
    assert task.num_train + task.num_test == 50
    epoch = {task.problem("train", i).prompt for i in range(task.num_train)}
    assert len(epoch) == task.num_train
    assert make_benchmark(f"file:{path}", Data(), "train", None).num_train == 0


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ([["1", "2", "2", "3", "4", "1"], None], ["2 rows whose prompt came before"]),
        (
            [["1", "2", "2", "3"], ["3", "5", "5"]],
            ["2 rows whose prompt came before", "1 row whose prompt is held out too"],
        ),
        ([["1", "2"], ["3"]], []),
    ],
)
def test_rows_that_are_not_trained_on_are_counted(tmp_path, capsys, splits, said):
    train_prompts, test_prompts = splits
    rows = [[{"prompt": text, "answer": "7"} for text in part or ()] for part in splits]
    if test_prompts is None:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[0]))
        source = f"file:{tmp_path}/a.jsonl"
    else:
        both = {"train": Dataset.from_list(rows[0]), "test": Dataset.from_list(rows[1])}
        DatasetDict(both).save_to_disk(tmp_path / "folder")
        source = f"file:{tmp_path}/folder"
    task = make_task(Data(task=source, test_fraction=0.5), 0, None)
    printed, _ = said_of(capsys, task=task)
    left_out = [line.split("left out: ")[1] for line in printed if "left out: " in line]
    assert len(left_out) == len(said)
    assert all(map(str.startswith, left_out, said))
    assert task.num_train + task.num_test == len({*train_prompts, *(test_prompts or ())})
