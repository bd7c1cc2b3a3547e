"""Configuration files: they go between preset and options, and a mistake is named in a line."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import pytest
import tyro

from trainer.__main__ import main
from trainer.config import Config, Optimizer, Rollout
from trainer.config.files import as_yaml, fill, leaves, read
from trainer.launch.command_line import parse
from trainer.presets import PRESETS

TOML = """
preset = "qwen3-1.7b"
steps = 7
rollout.prompts = 40
[optimizer]
learning-rate = 1e-6
betas = [0.8, 0.9]
[algorithm]
dual_clip = "none"
[engine]
devices = [2, 3]
placement = "beside"
"""
YAML = """
preset: qwen3-1.7b
steps: 7
rollout: {prompts: 40}
optimizer:
  learning_rate: 1e-6
  betas: [0.8, 0.9]
algorithm.dual_clip: null
engine: {devices: [2, 3], placement: beside}
"""
JSON = json.dumps(
    {
        "preset": "qwen3-1.7b",
        "steps": 7,
        "rollout": {"prompts": 40},
        "optimizer": {"learning_rate": 1e-6, "betas": [0.8, 0.9]},
        "algorithm": {"dual_clip": None},
        "engine": {"devices": [2, 3], "placement": "beside"},
    }
)


def parsed(*arguments):
    return parse([str(argument) for argument in arguments], "train")


def written(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yml", YAML), ("a.json", JSON)])
def test_a_file_goes_between_preset_and_options(tmp_path, name, text):
    preset = PRESETS["qwen3-1.7b"]()
    path = written(tmp_path, text, name)
    want = replace(
        preset,
        steps=7,
        rollout=replace(preset.rollout, prompts=40),
        optimizer=replace(preset.optimizer, learning_rate=1e-6, betas=(0.8, 0.9)),
        algorithm=replace(preset.algorithm, dual_clip=None),
        engine=replace(preset.engine, devices=(2, 3), placement="beside"),
    )
    assert parsed("--config", path) == parsed("qwen3-1.7b", f"--config={path}") == want
    changed = parsed("--steps", 9, "--config", path, "--rollout.group-size", 3)
    assert changed == replace(want, steps=9, rollout=replace(want.rollout, group_size=3))


def test_without_a_file_or_with_an_empty_one_it_is_the_preset(tmp_path):
    assert parsed() == parsed("--config", written(tmp_path, "")) == PRESETS["tiny"]()
    assert parsed("qwen3-8b") == PRESETS["qwen3-8b"]()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_printed_is_a_file(tmp_path, capsys, preset):
    assert main(["train", preset, "--print-config", "--seed", "5"]) == 0
    path = written(tmp_path, capsys.readouterr().out)
    want = replace(PRESETS[preset](), seed=5)
    assert parsed("--config", path) == parsed("tiny-long", "--config", path) == want
    assert not (tmp_path / "runs").exists()


def test_texts_that_look_like_something_else_come_back(tmp_path):
    values = {
        "name": "1e-6",
        "root": "null",
        "data.template": "- {question}: #\n yes ",
        "reward.format": "2024-01-01",
    }
    config = fill(Config(), values)
    assert parsed("--config", written(tmp_path, as_yaml(config))) == config


def test_the_run_json_of_a_run_and_its_folder(tmp_path):
    """A setting that the run did not have yet is its default, not that of a preset."""
    config = replace(PRESETS["tiny-long"](), seed=3)
    content = asdict(config)
    del content["steps"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": content, "starts": []}))
    want = replace(config, steps=Config().steps)
    assert parsed("--config", path) == want
    assert want.steps != PRESETS["tiny"]().steps
    assert parsed("tiny", "--config", path).steps == PRESETS["tiny"]().steps


def test_the_folder_of_a_run_is_that_run(tmp_path, monkeypatch):
    """It goes on where it is now, if it was moved."""
    folder = tmp_path / "moved" / "here"
    folder.mkdir(parents=True)
    config = replace(PRESETS["tiny"](), seed=3, root="runs", name="mine")
    (folder / "run.json").write_text(json.dumps({"config": asdict(config), "starts": []}))
    want = replace(config, root=str(folder.parent), name="here")
    assert parsed("--config", folder) == want
    assert parsed("--config", folder, "--name", "new") == replace(want, name="new")
    monkeypatch.chdir(folder)
    assert parsed("--config", ".") == want
    monkeypatch.chdir(folder.parent)
    assert parsed("--config", "here/") == replace(want, root=".")


def test_options_mend_what_a_file_alone_could_not_be(tmp_path, capsys):
    path = written(tmp_path, "rollout.prompts: 2")
    assert parsed("--config", path, "--algorithm.min-groups", 1).rollout.prompts == 2
    with pytest.raises(ValueError, match=r"mine.yaml: algorithm.min_groups must be at most .* 4$"):
        parsed("--config", path)
    with pytest.raises(SystemExit):
        parsed("--config", path, "--steps", 1)
    assert "algorithm.min_groups must be at most" in capsys.readouterr().err


def test_a_dataclass_around_it_has_options_of_its_own(tmp_path):
    @dataclass(frozen=True)
    class Request:
        gpus: int = 1
        config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    path = written(tmp_path, "steps: 7")
    arguments = ["--config", str(path), "--gpus", "8", "--seed", "2"]
    request = parse(arguments, "plan", around=lambda config: Request(config=config))
    assert request == Request(8, replace(PRESETS["tiny"](), steps=7, seed=2))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "rolout: {prompts: 3}", "no setting 'rolout.prompts'; close to it: roll.*"),
        ("a.yaml", "promts: 3", "no setting 'promts'; close to it: rollout.prompts"),
        ("a.yaml", "group_size: 3", "no setting 'group_size'; close to it: rollout.group_size"),
        ("a.yaml", "rollout: 3", "rollout must be a table of settings, such as rollout.prompts"),
        ("a.yaml", "steps: {a: 3}", "no setting 'steps.a'.*"),
        ("a.yaml", "steps: many", "steps must be a whole number; got 'many'"),
        ("a.yaml", "steps: 1.5", "steps must be a whole number; got 1.5"),
        ("a.yaml", "steps: true", "steps must be a whole number; got True"),
        ("a.yaml", "steps:", "steps must be a whole number; got None"),
        ("a.yaml", "name: 5", "name must be text; got 5"),
        ("a.yaml", "algorithm.fraction: x", "algorithm.fraction must be a number; got 'x'"),
        (
            "a.yaml",
            "algorithm.dual_clip: []",
            r"algorithm.dual_clip must be a number, or \"none\"; got \[\]",
        ),
        ("a.yaml", "model.gradient_checkpointing: 1", ".* must be true or false; got 1"),
        (
            "a.toml",
            'algorithm.loss_type = "most"',
            'algorithm.loss_type must be one of "dapo", "grpo"; got \'most\'',
        ),
        ("a.toml", "optimizer.betas = [0.9]", r"optimizer.betas must be a list: a number, .*0.9\]"),
        ("a.toml", "engine.devices = 1", "engine.devices must be a list, each a whole .* got 1"),
        ("a.toml", "steps = \n", r".*line 1.*"),
        ("a.toml", "steps = 1\nsteps = 2\n", ".*line 2.*"),
        ("a.yaml", "steps: 1\n\nsteps: 2", "line 1: key 'steps' is there twice"),
        ("a.yaml", "rollout: {prompts: 3}\nrollout.prompts: 4", "rollout.prompts is there twice"),
        ("a.yaml", "steps: [", "line 1: .*"),
        ("a.yaml", "- steps", r"must hold settings by name; got \['steps'\]"),
        ("a.json", "{", "Expecting .*line 1.*"),
        ("a.json", '{"steps": 1, "steps": 2}', "key 'steps' is there twice"),
        ("a.yaml", "preset: huge", "no preset 'huge'; there are tiny, .*"),
        ("a.yaml", "preset: 3", "preset must be text; got 3"),
        ("a.yaml", "algorithm.fraction: 5", r"algorithm: fraction must lie in \(0, 1\]; got 5.0"),
        ("a.txt", "steps: 3", "a configuration file ends in .toml, .yaml, .yml or .json"),
    ],
)
def test_a_mistake_is_named_in_a_line(tmp_path, capsys, name, text, says):
    path = written(tmp_path, text, name)
    assert main(["train", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=rf"{name}:? {says}$"):
        parsed("--config", path)


def test_a_file_that_is_not_there_or_not_once(tmp_path):
    path = written(tmp_path, "preset: tiny-long")
    for arguments, says in (
        (["--config", tmp_path / "b.yaml"], "b.yaml cannot be read: No such file"),
        (["--config", tmp_path], "run.json cannot be read: No such file"),
        (["--config"], "--config needs a file"),
        (["--config", "--steps"], "--config needs a file"),
        (["--config", path, "--config", path], "--config takes one file"),
        (["tiny", "--config", path], "has the preset 'tiny-long', the command 'tiny'"),
    ):
        with pytest.raises(ValueError, match=says):
            parsed(*arguments)


def test_every_setting_can_be_in_a_file(tmp_path):
    """Each type that a setting has can be read back."""
    config = replace(Config(), rollout=Rollout(prompts=5), optimizer=Optimizer(betas=(0.1, 0.2)))
    file = read(written(tmp_path, as_yaml(config)))
    assert file.values.keys() == leaves().keys()
    assert fill(Config(), file.values) == config
