"""patch_verl refuses the heads of which verl's fused forward would take the weight alone."""

import pytest
import torch

from entropy_kernels.integrations.verl import patch_verl
from tests.integrations.small_models import batch, build, by_logits
from tests.integrations.small_verl import fused

peft = pytest.importorskip("peft", reason="its adapters are what is refused")
# PEFT 0.21 asks transformers 5.23 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(autouse=True)
def _patched():
    with patch_verl():
        yield


def call(model, tokens):
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    labels = tokens["target"]
    return model(**inputs, shift_labels=labels, temperature=0.7, return_dict=True, use_cache=False)


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("gemma2", "bias=False, scale=1.0, softcap=3.0"),
        ("cohere", "bias=False, scale=0.25, softcap=None"),
        ("granite", "bias=False, scale=0.25, softcap=None"),
        ("minicpm3", "bias=False, scale=0.5, softcap=None"),
        ("phi", "bias=True, scale=1.0, softcap=None"),
        ("modernbert", None),
    ],
)
def test_heads_that_are_more_than_a_product(family, found):
    message = "layers of its own between" if found is None else rf"h W\^T; .* have {found}"
    with pytest.raises(ValueError, match=message):
        fused(family)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_other_heads_are_taken(family):
    tokens = batch()
    want = by_logits(build(family), tokens, 0.7)
    torch.testing.assert_close(call(fused(family), tokens).log_probs, want["logprob"])


def test_lora_on_the_head():
    """Refused in the forward, since verl adapts the model after it has fused the head."""
    model = fused()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"no gradient; got default: .*target_modules"):
        call(model, batch())


def test_lora_elsewhere_and_an_adapter_of_the_head_that_is_switched_off_or_merged():
    model, tokens = fused(), batch()
    want = call(model, tokens).log_probs.detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(call(model, tokens).log_probs, want)
    model = wrapped.unload()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with wrapped.disable_adapter():
        torch.testing.assert_close(call(model, tokens).log_probs, want)
    wrapped.merge_adapter()
    torch.testing.assert_close(call(model, tokens).log_probs, want)
