"""Logits that are never rounded to 16 bits, and the benchmark of what rounding them costs."""

import importlib.util
import json
import math

import pytest
import torch

import entropy_kernels as ek
from benchmarks import precision, precision_page
from entropy_kernels import backends


@pytest.fixture
def head():
    """States and a weight in bf16 whose largest logits lie between 16 and 32, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 64, generator=generator).bfloat16()
    weight = (torch.randn(3000, 64, generator=generator) * 6 / 8).bfloat16()
    logits = hidden.double() @ weight.double().T
    assert 16 < logits.amax(1).mean() < 32
    return hidden, weight, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_bf16_inputs_have_the_log_probs_entropies_and_gradients_of_fp32_logits(head, impl):
    if why := backends.why_not(impl, torch.device("cpu")):
        pytest.skip(why)
    hidden, weight, target = head
    found = ek.linear_logprob_entropy(ek.Head(hidden, weight, target), impl=impl)
    exact = precision.fp64_head(hidden, weight, target)
    rounded = precision.upcast_head(hidden, weight, target)
    for got, want, coarse in zip(found[:2], exact, rounded, strict=False):
        assert (got - want).abs().max() < 1e-5
        assert (coarse - want).abs().max() > 1e-2


def test_heads_that_round_logits_are_told_apart(head):
    """TRL's and eager code err by the rounding of a logit, ours by that of fp32."""
    exact = [precision.in_rows(precision.fp64_head, *head)]
    found = {
        name: precision.errors((precision.in_rows(function, *head),), exact)
        for name, function in precision.HEADS_OF.items()
        if name != "trl" or importlib.util.find_spec("trl")
    }
    ours = found.pop("ours")
    assert max(ours.values()) < 1e-5
    for errors in found.values():
        assert all(1e-2 < errors[name] < 0.3 for name in ("logprob_max", "entropy_max"))


def test_the_mismatch_is_its_formulas():
    sampler = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    trainer = torch.tensor([-1.1, -1.7, -0.5], dtype=torch.float64)
    found = precision.mismatch(trainer, sampler)
    k3 = [math.exp(d) - 1 - d for d in (-0.1, 0.3, 0.0)]
    assert found["k3"] == pytest.approx(sum(k3) / 3)
    assert found["k1"] == pytest.approx(-0.2 / 3)
    assert found["difference"] == pytest.approx(0.4 / 3)
    assert found["max_ratio"] == pytest.approx(math.exp(0.3))
    assert found["k3_error"] == pytest.approx(
        torch.tensor(k3).std().item() / math.sqrt(3), rel=1e-5
    )


def test_a_sampler_with_an_fp32_head_is_closer_to_ours(monkeypatch):
    """On a small model, whose backbone reads the same tokens with a cache and without."""
    pytest.importorskip("trl")
    monkeypatch.setattr(precision, "find_spec", lambda name: None if name == "vllm" else name)
    torch.manual_seed(0)
    shape = {"vocabulary": 3000, "width": 128, "layers": 1, "spread": 6.0}
    result = precision.measure(**shape, sequences=4, tokens=16)
    k3 = {(row["sampler"], row["head"]): row["k3"] for row in result["mismatch"]}
    assert len(k3) == 2 * 4
    of_fp32 = {name: k3["transformers fp32", name] for name in precision.HEADS_OF}
    assert of_fp32["ours"] == min(of_fp32.values())
    about = {"machine": "M", "versions": {"torch": "2"}, "commit": "c", "date": "d"}
    text = precision_page.tables(shape | {"sequences": 4, "tokens": 16} | about | result)
    assert text.count("| ours |") == 3
    assert "D = 128, V = 3,000" in text


@pytest.mark.parametrize("sampler", ["vllm bf16", "transformers bf16"])
def test_vllms_rows_are_not_overwritten_without_vllm(sampler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "find_spec", lambda _: None)
    file = tmp_path / "precision.json"
    file.write_text(json.dumps({"mismatch": [{"sampler": sampler}]}))
    monkeypatch.setattr(precision, "measure", lambda **_: pytest.fail("measured"))
    if sampler == "vllm bf16":
        with pytest.raises(SystemExit):
            precision.main(["--out", str(file)])
        assert f"without vLLM's rows where vLLM is not installed; got {file}" in (
            capsys.readouterr().err
        )
    else:
        with pytest.raises(pytest.fail.Exception, match="measured"):
            precision.main(["--out", str(file)])


def test_the_page_is_what_the_result_says():
    assert precision_page.PAGE.read_text() == precision_page.render()
    result = json.loads(precision_page.RESULT.read_text())
    assert {row["head"] for row in result["mismatch"]} == set(precision_page.HEADS)
    assert {row["sampler"] for row in result["mismatch"]} == set(precision_page.SAMPLERS)
    for sampler in precision_page.SAMPLERS:
        k3 = {r["head"]: r["k3"] for r in result["mismatch"] if r["sampler"] == sampler}
        assert k3["ours"] == min(k3.values())
