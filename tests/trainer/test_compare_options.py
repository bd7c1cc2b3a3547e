"""The command line of `compare`: its own options, and those of its runs."""

from dataclasses import replace

import pytest

import trainer.studies.compare
from trainer.__main__ import main
from trainer.presets import PRESETS
from trainer.studies.compare import Comparison


def asked(*arguments):
    """What `compare` would do with `arguments`."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer.studies.compare, "compare", lambda settings: found.append(settings) or 0
        )
        assert main(["compare", *map(str, arguments)]) == 0
    return found[0]


def test_options_of_the_runs_are_those_of_train(tmp_path):
    file = tmp_path / "short.toml"
    file.write_text('preset = "tiny-long"\n[rollout]\nprompts = 8\n')
    options = ["--steps", 3, "--eval.every", 2, "--rollout.group-size", 4]
    settings = asked("--config", file, "--arms", "all", "top-5", "--seeds", 2, *options)
    assert (settings.arms, settings.seeds, settings.jobs) == (("all", "top-5"), 2, 2)
    want = PRESETS["tiny-long"]()
    assert settings.config == replace(
        want,
        steps=3,
        eval=replace(want.eval, every=2),
        rollout=replace(want.rollout, prompts=8, group_size=4),
    )
    assert asked("qwen3-0.6b").config == PRESETS["qwen3-0.6b"]()
    assert asked() == Comparison(config=PRESETS["tiny"]())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--name=x", "--name is set in each run by --label; got --name=x"),
        ("--seed", "--seed is set in each run by --seeds and --first-seed; got --seed"),
        ("--algorithm.fraction", "--algorithm.fraction is set in each run by --arms"),
        ("--algorithm.clip_high=1", "--algorithm.clip-high is set in each run by --arms"),
    ],
)
def test_options_that_a_comparison_sets_are_refused(option, says, capsys, monkeypatch):
    """They would change nothing."""
    monkeypatch.setattr(trainer.studies.compare, "compare", lambda _: pytest.fail("the runs began"))
    assert main(["compare", "tiny", option]) == 1
    assert says in capsys.readouterr().err


def test_options_of_the_runs_are_not_spelt_otherwise(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "tiny", "--config.steps", "2"])
    assert "Unrecognized options: --config.steps, 2" in capsys.readouterr().err
