"""The command line, and every kind of task through the whole loop."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.small import save_folder
from trainer.__main__ import main
from trainer.config import Algorithm, Config, Data, Eval, Optimizer, Rollout
from trainer.log import read_rows
from trainer.presets import PRESETS

ROOT = Path(__file__).parents[2]
ONE_STEP = [
    "--steps=1",
    "--threads=1",
    "--device=cpu",
    "--eval.problems=2",
    "--rollout.prompts=4",
    "--rollout.group-size=8",
    "--rollout.batch-size=32",
    "--algorithm.min-groups=1",
]


@pytest.fixture(autouse=True)
def _here(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_a_command_it_says_which_there_are(capsys):
    assert main([]) == 2
    assert "    train [PRESET] [--options] " in capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert main(["bake"]) == 2
    printed = capsys.readouterr().out
    for command in ("train", "evaluate", "plan", "watch", "report", "export"):
        assert f"    {command} " in printed


def test_it_starts_as_a_module():
    command = [sys.executable, "-m", "trainer", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'it runs the preset "tiny"' in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "tiny", "--help"]])
def test_train_lists_every_option_and_what_it_means(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "python -m trainer train tiny" in text
    assert all(re.search(rf"[ ,]{name}[,.]", re.sub(r"\s+", " ", text)) for name in PRESETS)
    for option in ("--steps", "--model.path", "--rollout.group-size", "--algorithm.fraction"):
        assert option in text
    assert "The share of the response tokens that is trained on" in re.sub(r"[\s│]+", " ", text)
    assert f"default: {PRESETS['tiny']().steps}" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "huge"], "no preset 'huge'; there are tiny"),
        (["train", "--data.task", "cooking"], "no task 'cooking'"),
        (["train", "--model.path", "no/such/folder"], "no/such/folder"),
        (["train", "--rollout.temperature", "0"], "temperature must be > 0"),
        (["report"], "report takes one run's folder; got 0 arguments"),
        (["report", "a", "b"], "report takes one run's folder; got 2 arguments"),
        (["report", "nothing/here"], "nothing/here"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(capsys, arguments, says):
    if arguments[0] == "train" and len(arguments) > 2:
        arguments = [*arguments, "--warm-start.steps", "0"]
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status in (1, 2)
    assert says in re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [["--no-such-option", "1"], ["--steps", "many"]])
def test_a_bad_option_stops_with_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rollout(group_size=1), "rollout.group_size must be at least 2: .* prompt; got 1"),
        (lambda: Rollout(group_size=0), "rollout.group_size must be at least 2: .* prompt; got 0"),
        (lambda: Rollout(temperature=0.0), "temperature must be > 0 to train on; got 0.0"),
        (lambda: Algorithm(max_rounds=0), "max_rounds must be at least 1; got 0"),
        (lambda: Algorithm(fraction=1.5), r"fraction must lie in \(0, 1\]; got 1.5"),
        (
            lambda: Algorithm(which="bottom", entropy_source="current"),
            'which=\'bottom\' needs entropies .*"sampler" or "old"; got "current"',
        ),
        (lambda: Optimizer(mini_batches=0), "mini_batches must be at least 1; got 0"),
        (lambda: Config(keep_checkpoints=0), "keep_checkpoints must be at least 1; got 0"),
        (
            lambda: Config(keep_every=15),
            "keep_every must be 0 or a multiple of checkpoint_every, 10; got 15",
        ),
        (lambda: Config(keep_every=-10), "keep_every must be at least 0; got -10"),
        (lambda: Data(max_prompt_tokens=-1), "max_prompt_tokens must be at least 0; got -1"),
        (lambda: Config(eval=Eval(every=0)), "every must be at least 1; got 0"),
        (lambda: Config(rollout=Rollout(prompts=2)), "min_groups must be at most .*, 2, .* got 4"),
        (
            lambda: Config(algorithm=Algorithm(overlong_cache=49)),
            "overlong_cache must be at most rollout.max_new_tokens, 48; got 49",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def run_one_step(*options):
    assert main(["train", *ONE_STEP, *options, "--root", "runs"]) == 0
    before, after = read_rows(Path("runs/tiny/metrics.jsonl"))
    assert (before["step"], after["step"]) == (0, 1)
    return before, after


def test_a_file_of_prompts_with_any_local_model(tmp_path, capsys):
    """Random weights answer a digit now and then; the chat template reaches the prompt."""
    rows = [{"question": f"{i % 10} + {i // 10} =", "result": "7"} for i in range(60)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, after = run_one_step(
        f"--model.path={save_folder(tmp_path / 'model', 'qwen3')}",
        f"--data.task=file:{file}",
        "--data.prompt-field=question",
        "--data.answer-field=result",
        "--warm-start.steps=0",
        "--rollout.max-new-tokens=2",
        "--algorithm.max-rounds=8",
    )
    assert 0 <= before["eval/accuracy"] <= 1
    assert 0 < after["reward/mean"] < 1
    assert after["head/active_rows"] > 0
    assert after["grad_norm"] > 0
    samples = read_rows(Path("runs/tiny/samples.jsonl"))
    assert all(re.fullmatch(r"<user> \d \+ \d = <assistant>", row["prompt"]) for row in samples)
    printed = capsys.readouterr().out
    assert "report: runs/tiny/report.html" in printed
    assert main(["report", "runs/tiny"]) == 0
    assert capsys.readouterr().out == "report: runs/tiny/report.html\n"


def test_a_reasoning_gym_task(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the gym extra is not installed")
    before, after = run_one_step(
        f"--model.path={save_folder(tmp_path / 'model', max_position_embeddings=512)}",
        "--data.task=gym:basic_arithmetic",
        "--warm-start.steps=0",
        "--rollout.max-new-tokens=2",
        "--algorithm.max-rounds=2",
    )
    assert 0 <= before["eval/accuracy"] <= 1
    assert after["groups/sampled"] == 8
    assert after["tokens"] >= 64


def test_the_ladder_from_its_warm_start(tmp_path):
    """The preset itself, cut short: two supervised steps teach nothing, so no group is useful."""
    _, after = run_one_step(
        "--warm-start.steps=2", "--warm-start.traces=64", "--warm-start.cache=kept"
    )
    assert len(list(Path("kept").iterdir())) == 1
    rounds = PRESETS["tiny"]().algorithm.max_rounds
    assert after["groups/all_wrong"] == 4 * rounds
    assert after["skipped/few_groups"] == 1
