"""Folders of models: what is wrong is one line, and what is saved again is what was there."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tests.trainer.small import build_tokenizer, on_even, save_folder, settings  # noqa: F401
from trainer.__main__ import main
from trainer.config import Model
from trainer.policy import read_policy
from trainer.train import train

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model at runs/tiny/exported, seen from the folder above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Path(save_folder(Path("runs/tiny/exported")))


def said(path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_policy(Model(path=str(path)), 0)
    text = str(caught.value)
    assert "\n" not in text
    prefix = f"no model can be loaded from model.path {str(path)!r}: "
    assert text.startswith(prefix)
    return text.removeprefix(prefix)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("runs/tiny/exportd", "runs/tiny/exported"),
        ("runs/tinny/exported", "runs/tiny"),
        ("run/tiny/exported", "runs"),
        ("./runs/tiny/export", "runs/tiny/exported"),
        ("~/run", "runs"),
        ("runs/tin", "runs/tiny"),
        ("run", "runs"),
        ("/nowhere/at/all", "none"),
        ("./x", "none"),
    ],
)
def test_a_folder_that_is_missing_is_told_with_those_near(model, path, near):
    text = said(path)
    assert text.startswith("there is no such folder; near it: ")
    assert text.endswith(near)


@pytest.mark.parametrize("path", ["Qwen/Qwen3-8B-Bse", "gpt2"])
def test_a_hub_name_is_asked_for_there(model, path, monkeypatch):
    """Without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "connect to 'https://huggingface.co'" in said(path)
    assert logging.getLogger("huggingface_hub").level != logging.ERROR


def without_config(folder):
    (folder / "config.json").unlink()


def only_optimizer(folder):
    shutil.rmtree(folder)
    (folder / "optimizer").mkdir(parents=True)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def change(folder, changed):
    tensors = load_file(folder / WEIGHTS)
    changed(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_config, "it has no config.json, so it is no model's folder; it holds "),
        (only_optimizer, "it has no config.json, so it is no model's folder; it holds optimizer"),
        (empty, "it has no config.json, so it is no model's folder; it holds nothing"),
        (a_file, "it is a file, and wanted is a folder or a hub name"),
        (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x"), "header too small"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:2000]), "header"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), ""),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda f: (f / "config.json").write_text('{"model_type": "new"}'), "model type `new`"),
        (
            lambda f: change(f, lambda tensors: tensors.pop("model.norm.weight")),
            "model.norm.weight is missing or of another shape among its weights",
        ),
        (
            lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(8)})),
            "model.norm.weight of shape (8,) is missing or of another shape",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ""),
    ],
)
def test_what_is_damaged_is_told_in_a_line(model, damage, says):
    damage(model)
    assert says in said(model)


def test_the_folder_of_a_run_says_how_to_make_a_model_of_it(model):
    train(settings(Path("runs"), str(model), steps=2))
    text = said("runs/run")
    assert text == (
        "it is the folder of a run: `python -m trainer export runs/run FOLDER` makes a model of "
        "it, or name runs/run/checkpoints/step-000002"
    )
    read_policy(Model(path="runs/run/checkpoints/step-000002"), 0)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model):
    build_tokenizer(extra_special_tokens=["<a>", "<b>"]).save_pretrained(model)
    with pytest.raises(
        ValueError,
        match=r"exported has tokens that the model has not: 2, up to '<b>' with id 18, for 17 rows",
    ):
        read_policy(Model(path=str(model)), 0)


@pytest.fixture
def source(model):
    """What a run would change, if it saved what it works with: noise, padding, sampling."""
    tokenizer = build_tokenizer(pad_token=None, model_max_length=77)
    tokenizer.padding_side = "right"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (model / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config |= {"attention_dropout": 0.25, "pad_token_id": None, "note": {"of": "its maker"}}
    (model / "config.json").write_text(json.dumps(config))
    # As published ones are: settings that transformers warns of, and does not save.
    generation = {"temperature": 0.6, "do_sample": False, "eos_token_id": [1, 7], "top_p": 0.95}
    (model / "generation_config.json").write_text(json.dumps(generation))
    return model


def test_checkpoints_and_exports_have_the_settings_of_the_source(source):
    train(settings(Path("runs"), str(source), steps=2))
    train(settings(Path("runs"), str(source), steps=4))  # goes on from its own checkpoint
    assert main(["export", "runs/run", "out", "--dtype", "bfloat16"]) == 0
    files = {p.name for p in source.iterdir()} - {WEIGHTS}
    for folder, dtype in (("runs/run/checkpoints/step-000004", "float32"), ("out", "bfloat16")):
        for name in files - {"config.json"}:
            assert (Path(folder) / name).read_bytes() == (source / name).read_bytes()
        want = json.loads((source / "config.json").read_text()) | {"dtype": dtype}
        assert json.loads((Path(folder) / "config.json").read_text()) == want
    got, want = AutoTokenizer.from_pretrained("out"), AutoTokenizer.from_pretrained(source)
    assert (got.pad_token, got.padding_side) == (want.pad_token, want.padding_side)
    assert (got.pad_token, got.padding_side) == (None, "right")
    assert AutoConfig.from_pretrained("out").attention_dropout == 0.25
    assert GenerationConfig.from_pretrained("out").temperature == 0.6
    policy = read_policy(Model(path="out"), 0)
    assert policy.tokenizer.padding_side == "left"
    assert policy.tokenizer.pad_token_id == 1
    assert policy.eos_ids.tolist() == [1, 7]
