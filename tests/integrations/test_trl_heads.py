"""Whatever the head of a model is, TRL's fused head with ours says what the model's logits say."""

import pytest
import torch

pytest.importorskip("trl", reason="the adapter is for TRL")

from peft import LoraConfig
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from trl.trainer import utils

from entropy_kernels.integrations.trl import patch_trl
from tests.integrations.small_grpo import build_trainer
from tests.integrations.small_models import (
    VOCABULARY,
    assert_same_gradients,
    batch,
    build,
    by_logits,
    fill_lora,
    gradients,
)
from tests.trainer.small import build_model

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = {"target_modules": ["q_proj", "lm_head"], "r": 3, "lora_alpha": 5}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 3}


def adapted(family="qwen3", tied=False, **options):
    """With an adapter that transformers adds, of which TRL's trainers see nothing."""
    torch.manual_seed(5)
    model = build(family, tie_word_embeddings=tied)
    model.add_adapter(LoraConfig(**{"lora_dropout": 0.0, **options}))
    return fill_lora(model)


def fused(model, tokens, outputs=("log_probs", "entropy"), run=None):
    """What the patched head says of the targets, in fp32; temperature 0.7."""
    utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with patch_trl():
        run = model if run is None else run(model)
        out = run(**inputs, shift_labels=tokens["target"], fused_lm_head=True)
    return {"logprob": out.log_probs, "entropy": out.entropy}


def assert_as_by_logits(model, run=None):
    """Log-probabilities, entropies and all gradients, the adapters' among them."""
    tokens = batch()
    want = by_logits(model, tokens, 0.7)
    want_grads = gradients(model, want | {"logsumexp": want["logprob"]})
    got = fused(model, tokens, run=run)
    for name, found in got.items():
        torch.testing.assert_close(found, want[name], rtol=1e-5, atol=1e-5)
    got_grads = gradients(model, got | {"logsumexp": got["logprob"]})
    assert_same_gradients(got_grads, want_grads, digits=5e-5)
    return want_grads


CASES = {
    "lora": {},
    "rank-stabilised": {"use_rslora": True},
    "softcap": {"family": "gemma2"},
    "scale": {"family": "granite"},
    "bias": {"family": "phi"},
    "tied": {"family": "qwen3", "tied": True},
}


@pytest.mark.parametrize("case", CASES)
def test_lora_on_the_head(case):
    grads = assert_as_by_logits(adapted(**HEAD | CASES[case]))
    assert all(grads[f"lm_head.lora_{x}.default.weight"].abs().max() > 1e-3 for x in "AB")


def test_a_saved_head():
    grads = assert_as_by_logits(adapted(**SAVED))
    assert grads["lm_head.modules_to_save.default.weight"].abs().max() > 1e-3


def test_lora_on_a_tied_embedding():
    """PEFT adapts the embedding and not the head."""
    assert_as_by_logits(adapted(tied=True, target_modules=["q_proj", "embed_tokens"]))


def test_lora_on_the_head_of_a_compiled_model(unchecked_shapes):
    assert_as_by_logits(adapted(**HEAD), lambda model: torch.compile(model, backend="eager"))


def test_an_adapter_that_is_switched_off():
    model, tokens = adapted(**HEAD), batch()
    on = by_logits(model, tokens, 0.7)["logprob"]
    model.disable_adapters()
    off = by_logits(model, tokens, 0.7)["logprob"]
    assert not torch.allclose(on, off, atol=0.1)
    torch.testing.assert_close(fused(model, tokens)["logprob"], off, rtol=1e-5, atol=1e-5)


def test_lora_on_the_head_where_trl_s_own_function_is_asked():
    model, tokens = adapted(**HEAD), batch()
    want = by_logits(model, tokens, 0.7)["logprob"]
    got = fused(model, tokens, outputs=("log_probs", "is_top1"))["logprob"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_trainer_trains_the_adapters_of_the_head(tmp_path):
    model = build_model("qwen3")
    model.add_adapter(LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    with patch_trl():
        trainer = build_trainer(tmp_path, model=model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer.train()
    for x in "AB":
        name = f"lm_head.lora_{x}.default.weight"
        assert (model.get_parameter(name) - before[name]).abs().max() > 1e-3


def test_trl_s_trainers_refuse_such_a_peft_model(tmp_path):
    with patch_trl(), pytest.raises(ValueError, match="PEFT adapter to `lm_head`"):
        build_trainer(tmp_path, peft=LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_other_adapters_of_the_head_are_refused():
    with pytest.raises(ValueError, match=r"adapter 'default' must be plain LoRA.*Dora"):
        fused(adapted(**HEAD, use_dora=True), batch())


@pytest.mark.parametrize("family", ["cohere", "granite", "hyperclovax", "minicpm3", "nanochat"])
def test_scales_and_softcaps(family):
    assert_as_by_logits(build(family))


def test_a_softcap_of_the_config_that_the_model_does_not_apply():
    assert_as_by_logits(build("gemma3-images"))


def test_a_softcap_under_a_name_that_trl_does_not_read():
    torch.manual_seed(3)
    config = RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        lru_width=16,
        block_types=["attention"],
        attention_window_size=16,
        logits_soft_cap=2.0,
    )
    model, tokens = RecurrentGemmaForCausalLM(config).eval(), batch()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    want = by_logits(model, tokens, 0.7)
    for name, found in fused(model, tokens).items():
        torch.testing.assert_close(found, want[name], rtol=1e-5, atol=1e-5)


def test_layers_between_the_backbone_and_the_head_are_refused():
    with pytest.raises(ValueError, match=r"ModernBertDecoder.* layers of its own between"):
        fused(build("modernbert"), batch())
