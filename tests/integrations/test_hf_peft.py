"""PEFT models with their heads patched: gradients of the adapters are those of PEFT's logits."""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.integrations.hf import lm_head, patch_lm_head
from tests.integrations.small_models import (
    VOCABULARY,
    assert_same_gradients,
    batch,
    build,
    by_head,
    by_logits,
    by_patch,
    fill_lora,
    gradients,
)

peft = pytest.importorskip("peft", reason="its adapters are what is tested")
# PEFT 0.21 asks transformers 5.23 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

BACKBONE = {"target_modules": ["q_proj", "v_proj"]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
CASES = {
    "backbone": ("qwen3-tied", BACKBONE),
    "head": ("qwen3", HEAD),
    "rank-stabilised head": ("qwen3", {**HEAD, "use_rslora": True, "r": 3}),
    "head with a softcap": ("gemma2", HEAD),
    "head with a bias": ("phi", HEAD),
    "head with dropout": ("qwen3", {**HEAD, "lora_dropout": 0.3}),
    "saved head": ("qwen3", {**BACKBONE, "modules_to_save": ["lm_head"]}),
}


def adapted(family="qwen3", **options):
    """A PEFT model whose update is not zero. PEFT warns of a tied head with an update."""
    torch.manual_seed(5)
    tied = "lm_head" not in options["target_modules"] and family.endswith("tied")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **options})
    return fill_lora(peft.get_peft_model(build(family, tie_word_embeddings=tied), settings))


def compare(model, tokens, found=by_patch):
    torch.manual_seed(7)
    want = by_logits(model, tokens, 0.7)
    want_grads = gradients(model, want)
    torch.manual_seed(7)
    got = found(model, tokens, 0.7)
    for name, truth in want.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, got), want_grads, digits=5e-5)
    return want


@pytest.mark.parametrize("found", [by_patch, by_head])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_adapters(case, found):
    family, options = CASES[case]
    model, tokens = adapted(family, **options).train(), batch()
    plain = by_logits(model, tokens, 0.7)
    want = compare(model, tokens, found)
    assert (case == "head with dropout") == (not torch.equal(plain["logprob"], want["logprob"]))


def test_the_update_matters_and_can_be_switched_off():
    model, tokens = adapted(**HEAD), batch()
    with patch_lm_head(model):
        on = model(**tokens).logprob
        with model.disable_adapter():
            off = model(**tokens).logprob
            torch.testing.assert_close(off, by_logits(model, tokens)["logprob"])
        assert not torch.allclose(on, off, atol=0.1)
        model.base_model.merge_adapter()
        torch.testing.assert_close(model(**tokens).logprob, on, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(**tokens).logprob, off, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("found", [by_patch, by_head])
def test_adapters_that_come_and_go(found):
    model, tokens = adapted(**HEAD), batch()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, **HEAD))
    fill_lora(model)
    for names in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(names)
        compare(model, tokens, found)


def test_a_found_head_follows_its_adapters():
    """Switched off, merged, given after the head was found, and another one of each sequence."""
    model, tokens = build("gemma2", tie_word_embeddings=False), batch()
    inputs, target = {n: x for n, x in tokens.items() if n != "target"}, tokens["target"]
    head = lm_head(model)
    wrapped = fill_lora(peft.get_peft_model(model, peft.LoraConfig(**HEAD)))

    def check():
        states = head(head.hidden_states(**inputs), target)
        got = ek.linear_logprob_entropy(states).logprob
        want = by_logits(wrapped, tokens)["logprob"]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        return want.detach()

    on = check()
    with wrapped.disable_adapter():
        assert not torch.allclose(on, check(), atol=0.1)
    wrapped.base_model.merge_adapter()
    torch.testing.assert_close(check(), on, rtol=1e-5, atol=1e-5)
    wrapped.base_model.unmerge_adapter()
    mixed = {"adapter_names": ["default", "__base__", "default"]}
    with pytest.raises(ValueError, match="hidden states alone; got adapter_names"):
        lm_head(wrapped.eval()).hidden_states(**inputs, **mixed)


def test_a_small_update_survives_16_bits():
    """Added to W in bf16, an update of a thousandth of it would be rounded away, mostly."""
    model, tokens = adapted(target_modules=["lm_head"]), batch()
    inner = model.get_base_model()
    inner.model.norm.register_forward_hook(lambda module, args, states: states.bfloat16())
    inner.lm_head.base_layer.to(torch.bfloat16)
    with torch.no_grad():
        inner.lm_head.lora_B.default.weight.mul_(2e-3)
        weight, update = inner.lm_head.base_layer.weight, inner.lm_head.get_delta_weight("default")
        merged = weight + update.bfloat16()
        states = inner.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])

    def logprob(weight):
        z = states.last_hidden_state.double() @ weight.T
        safe = tokens["target"].clamp_min(0)[..., None]
        picked = z.log_softmax(-1).gather(-1, safe)[..., 0]
        return picked.masked_fill(tokens["target"] == -100, 0.0)

    want = logprob(weight.double() + update.double()) - logprob(weight.double())
    rounded = logprob(merged.double()) - logprob(weight.double())
    with patch_lm_head(model), torch.no_grad():
        got = model(**tokens).logprob
        with model.disable_adapter():
            got = got - model(**tokens).logprob
    error = (got.double() - want).abs().max()
    assert error < 0.1 * (rounded - want).abs().max()


def test_the_head_may_not_change_after_the_patch():
    model, tokens = build("qwen3"), batch()
    patch = patch_lm_head(model)
    wrapped = fill_lora(peft.get_peft_model(model, peft.LoraConfig(**HEAD)))
    with pytest.raises(ValueError, match="was replaced since patch_lm_head"):
        wrapped(**tokens)
    patch.undo()
    with patch_lm_head(wrapped):
        compare(wrapped, tokens)


def test_the_backbone_may_change_after_the_patch():
    model, tokens = build("qwen3"), batch()
    with patch_lm_head(model) as patch:
        wrapped = fill_lora(peft.get_peft_model(model, peft.LoraConfig(**BACKBONE)))
        assert patch_lm_head(wrapped) is patch
        compare(wrapped, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "must be plain LoRA.*Dora"),
        ({"lora_bias": True}, "must be plain LoRA.*a bias"),
    ],
    ids=["dora", "bias"],
)
def test_other_updates_of_the_head_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        patch_lm_head(adapted("phi", **HEAD, **options))


def test_other_layers_are_refused():
    settings = peft.LoHaConfig(target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"PEFT's LoRA.*got Linear"):
        patch_lm_head(peft.get_peft_model(build("qwen3"), settings))


def test_prompt_learning_is_refused():
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="adds tokens"):
        patch_lm_head(peft.get_peft_model(build("qwen3"), settings))


def test_generation_is_peft_s():
    model, tokens = adapted(**HEAD), batch()
    del tokens["target"]
    want = model.generate(**tokens, max_new_tokens=5, do_sample=False)
    with patch_lm_head(model):
        assert torch.equal(model.generate(**tokens, max_new_tokens=5, do_sample=False), want)
    assert want.max() < VOCABULARY
