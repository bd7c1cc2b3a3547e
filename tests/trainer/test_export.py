"""A run's policy as a transformers folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.trainer.small import FAMILIES, build_policy
from trainer import checkpoint
from trainer.__main__ import main
from trainer.checkpoint import Progress
from trainer.ranks import Ranks

ALONE = Ranks(torch.device("cpu"))


def save(run, family="qwen3", step=2, **options):
    """A checkpoint of a policy of random weights; returns the policy."""
    policy = build_policy(family, **options)
    policy.model.generation_config.eos_token_id = [1, 2]
    optimizer = torch.optim.AdamW(policy.model.parameters())
    checkpoint.save(run, policy, optimizer, Progress(step), 9, ALONE)
    return policy


def assert_exported(out, policy, dtype=torch.float32):
    """It loads as it is, and has the policy's weights."""
    model = AutoModelForCausalLM.from_pretrained(out)
    got, want = model.state_dict(), policy.model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(value, want[name].to(dtype)) for name, value in got.items())
    assert {value.dtype for value in got.values()} == {dtype}
    assert type(model) is type(policy.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_policy(tmp_path, family, capsys):
    policy = save(tmp_path / "run", family)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"model: {out}\n")
    assert_exported(out, policy)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 2]
    text = "1 + 2 ="
    assert AutoTokenizer.from_pretrained(out)(text) == policy.tokenizer(text)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(policy.model).__name__]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_in_another_dtype(tmp_path):
    policy = save(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    assert main(["export", str(tmp_path / "run"), str(out), "--dtype", "bfloat16"]) == 0
    assert_exported(out, policy, torch.bfloat16)


def test_of_a_step(tmp_path):
    older, newer = (save(tmp_path / "run", step=step, seed=step) for step in (2, 4))
    for name, options, policy in (("a", ["--step=2"], older), ("b", [], newer)):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / name), *options]) == 0
        assert_exported(tmp_path / name, policy)


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"

    def error(*options):
        assert main(["export", str(run), str(out), *options]) == 1
        assert not out.exists() or out.is_file()
        return capsys.readouterr().err

    assert f"{run} has no checkpoint" in error()
    save(run)
    assert "run has no checkpoint of step 3; it has 2" in error("--step=3")
    (run / "checkpoints" / "step-000002" / "config.json").write_text("{}")
    assert "config.json is damaged" in error("--step=2")
    assert "no checkpoint of" in error()
    save(run, step=4)
    out.write_text("")
    assert "out is not empty; choose another folder" in error()
