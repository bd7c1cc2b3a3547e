"""The warm start: it learns, it is the same to the bit, and what it keeps is whole."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_kernels.integrations.hf import lm_head
from tests.trainer.small import build_model
from trainer.config import WarmStart
from trainer.tasks.ladder import Ladder
from trainer.tiny.model import build_tiny
from trainer.tiny.warm_start import _example, _loss, _rate, load_or_warm_start, warm_start

SETTINGS = WarmStart(steps=3, traces=100, batch_size=16, warmup_steps=1)


def started(seed=0, settings=SETTINGS, report=None):
    model, tokenizer = build_tiny(0)
    warm_start(model, tokenizer, Ladder(0), settings, seed, report)
    return model


def same(model, other) -> bool:
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_loss_falls_and_is_reported():
    reports = []
    model = started(report=lambda step, metrics: reports.append((step, metrics)))
    assert [step for step, _ in reports] == [1, 2, 3]
    losses = [metrics["loss"] for _, metrics in reports]
    assert losses[0] == pytest.approx(4.7, abs=0.1)  # ln 112, an untrained model's
    assert losses[2] < losses[1] < losses[0]
    assert all(metrics["tokens_per_second"] > 0 for _, metrics in reports)
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training == build_tiny(0)[0].training


def test_seed_fixes_every_bit():
    assert same(started(seed=0), started(seed=0))
    assert not same(started(seed=0), started(seed=1))


@pytest.mark.parametrize("family", ["tiny", "gemma2", "hyperclovax", "llama4"])
def test_loss_is_that_of_the_response_tokens(family):
    """Also of logits that the model bounds or multiplies, and without a `base_model`."""
    model, tokenizer = build_tiny(0)
    if family != "tiny":
        model = build_model(family, vocab_size=len(tokenizer))
    pairs = Ladder(0).demonstrations(5, seed=0)
    examples = [_example(tokenizer, *pair) for pair in pairs]
    loss, count = _loss(lm_head(model), examples)
    terms = []
    for problem, response in pairs:
        prompt = problem.prompt
        ids = tokenizer(prompt + response, return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        logprob = model(ids).logits[0, :-1].log_softmax(-1)
        prompt_length = len(tokenizer.encode(prompt))
        for position in range(prompt_length, ids.shape[1]):
            terms.append(-logprob[position - 1, ids[0, position]])
    assert count == len(terms)
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_rate():
    settings = WarmStart(steps=600)
    assert _rate(0, settings) == 1 / 50
    assert _rate(49, settings) == _rate(50, settings) == 1.0
    assert _rate(325, settings) == pytest.approx(0.55)
    assert _rate(600, settings) == pytest.approx(0.1)


def test_kept_start_loads_bit_for_bit(tmp_path):
    settings = replace(SETTINGS, cache=str(tmp_path / "cache"))
    first, tokenizer = build_tiny(0)
    folder = load_or_warm_start(first, tokenizer, Ladder(0), settings, 0)
    assert same(first, started())

    def fail(*_):
        raise AssertionError("trained again")

    second, _ = build_tiny(0)
    assert load_or_warm_start(second, tokenizer, Ladder(0), settings, 0, fail) == folder
    assert same(first, second)
    assert second.get_output_embeddings().weight is second.get_input_embeddings().weight
    assert same(first, AutoModelForCausalLM.from_pretrained(folder))
    assert len(AutoTokenizer.from_pretrained(folder)) == 112
    assert [path.name for path in Path(settings.cache).iterdir()] == [folder.name]


def test_two_runs_at_the_same_start(tmp_path):
    """The second to be done takes what the first has put there."""
    settings, ladder = replace(SETTINGS, cache=str(tmp_path / "cache")), Ladder(0)
    (model, tokenizer), (other, _) = build_tiny(0), build_tiny(0)
    done_meanwhile = []

    def report(step, metrics):
        if step == settings.steps:
            done_meanwhile.append(load_or_warm_start(other, tokenizer, ladder, settings, 0))

    folder = load_or_warm_start(model, tokenizer, ladder, settings, 0, report)
    assert done_meanwhile == [folder]
    assert same(model, other)
    assert [path.name for path in Path(settings.cache).iterdir()] == [folder.name]


def test_all_that_shapes_a_start_names_it(tmp_path):
    settings = replace(SETTINGS, steps=1, cache=str(tmp_path))

    def folder(settings=settings, seed=0, model_seed=0, task_seed=0):
        model, tokenizer = build_tiny(model_seed)
        return load_or_warm_start(model, tokenizer, Ladder(task_seed), settings, seed)

    first = folder()
    assert folder() == first
    others = {
        folder(seed=1),
        folder(model_seed=1),
        folder(replace(settings, learning_rate=1e-3)),
        folder(replace(settings, traces=99)),
    }
    assert len(others - {first}) == 4
    assert folder(replace(settings, cache=str(tmp_path / "other"))).name == first.name


def test_a_killed_run_leaves_nothing_half_made(tmp_path):
    script = f"""
import os, signal
from entropy_kernels.integrations.hf import lm_head
from tests.trainer.small import build_model
from trainer.config import WarmStart
from trainer.tasks.ladder import Ladder
from trainer.tiny.model import build_tiny
from trainer.tiny.warm_start import load_or_warm_start
model, tokenizer = build_tiny(0)
save = model.save_pretrained
def killed(folder):
    save(folder)
    os.kill(os.getpid(), signal.SIGKILL)
model.save_pretrained = killed
settings = WarmStart(steps=1, traces=100, batch_size=16, cache={str(tmp_path)!r})
load_or_warm_start(model, tokenizer, Ladder(0), settings, 0)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert run.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".unfinished-") for path in tmp_path.iterdir())
    settings = WarmStart(steps=1, traces=100, batch_size=16, cache=str(tmp_path))
    model, tokenizer = build_tiny(0)
    reports = []
    folder = load_or_warm_start(
        model, tokenizer, Ladder(0), settings, 0, lambda *report: reports.append(report)
    )
    assert len(reports) == 1
    assert same(model, AutoModelForCausalLM.from_pretrained(folder))


def test_an_interrupted_save_is_cleaned_up(tmp_path, monkeypatch):
    model, tokenizer = build_tiny(0)

    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save_pretrained", interrupted)
    settings = replace(SETTINGS, cache=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        load_or_warm_start(model, tokenizer, Ladder(0), settings, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_task_without_demonstrations_is_refused(tmp_path):
    class Silent:
        name = "gym:silent"

    model, tokenizer = build_tiny(0)
    settings = replace(SETTINGS, cache=str(tmp_path))
    for call in (warm_start, load_or_warm_start):
        with pytest.raises(ValueError, match="'gym:silent' has no demonstrations"):
            call(model, tokenizer, Silent(), settings, 0)


@pytest.mark.parametrize("name", ["steps", "traces", "batch_size"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"needs {name} >= 1, not 0"):
        started(settings=replace(SETTINGS, **{name: 0}))
