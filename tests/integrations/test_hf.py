"""transformers models with their heads patched: what they return beside what test_lm_head has."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

import entropy_kernels as ek
from entropy_kernels.integrations.hf import LogprobEntropyOutput, patch_lm_head
from tests.integrations.small_models import (
    VOCABULARY,
    assert_as_in_fp64,
    batch,
    build,
    by_logits,
    by_patch,
)


def test_scale_and_softcap_together():
    class Both(Qwen3ForCausalLM):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = 2.5 * torch.tanh(0.7 * output.logits / 2.5)
            return output

    model = Both(build("qwen3").config).eval()
    nn.init.normal_(model.lm_head.weight)
    found = assert_as_in_fp64(by_patch, model, batch(), temperature=0.9)
    assert found["logsumexp"].abs().max() <= 2.5 / 0.9 + torch.tensor(float(VOCABULARY)).log()


def test_gradient_checkpointing():
    model = build("qwen3").train()
    # Its name changed within transformers 5.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    assert_as_in_fp64(by_patch, model, batch())


def test_a_compiled_backbone():
    model = build("qwen3-tied")
    model.model = torch.compile(model.model, backend="aot_eager", dynamic=False)
    assert_as_in_fp64(by_patch, model, batch())


def test_autocast_computes_what_a_bf16_head_is_given():
    """The logits' route rounds logits to bf16; ours does not, so truth is of the same operands."""
    model, tokens = build("qwen3"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16), patch_lm_head(model):
        found = model(**tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        rough = by_logits(model, tokens)
        states = model.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
    want = ek.linear_logprob_entropy(
        ek.Head(
            states.bfloat16().double(), model.lm_head.weight.bfloat16().double(), tokens["target"]
        ),
        impl="reference",
    )
    for name, eager in rough.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), getattr(want, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name], eager.float(), rtol=0.05, atol=0.05)
    found.logprob.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert model.lm_head.weight.grad.abs().max() > 0


def test_logits_to_keep_of_all_targets(unchecked_shapes):
    with pytest.raises(ValueError, match="leading shape"):
        by_patch(build("llama"), batch(), logits_to_keep=4)


def test_other_outputs_are_passed_on():
    model = build("gpt-oss")
    tokens = batch()
    target = tokens.pop("target")
    options = {"output_hidden_states": True, "output_router_logits": True, "use_cache": True}
    want = model(**tokens, **options)
    assert isinstance(want, MoeCausalLMOutputWithPast)
    with patch_lm_head(model):
        found = model(**tokens, target=target, **options)
    assert isinstance(found, LogprobEntropyOutput)
    assert torch.equal(found.aux_loss, want.aux_loss)
    assert torch.equal(found.hidden_states[-1], want.hidden_states[-1])
    assert found.past_key_values.get_seq_length() == 11


def test_statistics_are_of_the_logits_that_the_model_returns():
    model, tokens = build("gemma2"), batch()
    inputs = {name: x for name, x in tokens.items() if name != "target"}
    logp = (model(**inputs).logits.double() / 0.7).log_softmax(-1)
    none = tokens["target"] == -100
    with patch_lm_head(model):
        found = model(**tokens, temperature=0.7, statistics=("max_prob", "varentropy"))
    mean = (logp.exp() * logp).sum(-1)
    wants = {
        "max_prob": logp.exp().amax(-1),
        "varentropy": (logp.exp() * logp.square()).sum(-1) - mean.square(),
    }
    for name, want in wants.items():
        assert not found[name].requires_grad
        torch.testing.assert_close(
            found[name].double(), want.masked_fill(none, 0.0), rtol=1e-5, atol=1e-5
        )
    assert found.sum_p2 is None


@pytest.mark.parametrize("form", ["shared", "per token"])
def test_log_probs_of_chosen_ids_are_those_of_the_logits(form):
    model, tokens = build("gemma2"), batch()
    inputs = {name: x for name, x in tokens.items() if name != "target"}
    ids = torch.tensor([3, 0, 3])
    if form == "per token":
        ids = torch.stack([tokens["input_ids"], tokens["input_ids"].flip(1)], -1)
    valid = (tokens["target"] != -100)[..., None]
    logp = (model(**inputs).logits.double() / 0.7).log_softmax(-1)
    want = logp.gather(-1, ids.expand(*logp.shape[:2], -1)) * valid
    slope = torch.randn(want.shape)
    weight = model.get_output_embeddings().weight
    (wanted,) = torch.autograd.grad((want * slope).sum(), weight)
    with patch_lm_head(model):
        found = model(**tokens, temperature=0.7, token_ids=ids)
        assert model(**tokens).token_logprobs is None
    torch.testing.assert_close(found.token_logprobs.double(), want, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad((found.token_logprobs * slope).sum(), weight)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-4)


def test_generation_is_unchanged():
    model = build("gemma2")
    tokens = batch()
    target = tokens.pop("target")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    want = model.generate(**tokens, **options)
    signature = inspect.signature(model.forward)
    with patch_lm_head(model):
        assert inspect.signature(model.forward) == signature
        model(**tokens, target=target)
        got = model.generate(**tokens, **options)
        assert isinstance(model(**tokens), CausalLMOutputWithPast)
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        assert ours.shape == (3, VOCABULARY)
        assert torch.equal(ours, theirs)


def test_undone_twice_and_patched_twice():
    model, tokens = build("qwen3"), batch()
    patch = patch_lm_head(model)
    assert patch_lm_head(model) is patch
    with pytest.raises(ValueError, match="impl='auto'"):
        patch_lm_head(model, impl="torch")
    patch.undo()
    patch.undo()
    assert not patch.active
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    assert patch_lm_head(model, impl="torch") is not patch
    assert model(**tokens).logprob.shape == tokens["target"].shape


def test_what_was_patched_over_is_not_undone():
    model = build("qwen3")
    patch = patch_lm_head(model)
    model.forward = model.forward.original
    with pytest.raises(RuntimeError, match=r"Qwen3ForCausalLM\.forward was replaced again"):
        patch.undo()
    assert patch.active


def test_a_deep_copy_is_a_model_of_its_own():
    """A reference model is often one; a closure would run the policy's weights."""
    model, tokens = build("qwen3"), batch()
    patch = patch_lm_head(model)
    twin = copy.deepcopy(model)
    before = twin(**tokens).logprob
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.norm.weight.mul_(2)
    assert torch.equal(twin(**tokens).logprob, before)
    assert not torch.allclose(model(**tokens).logprob, before)
    patch.undo()
    assert patch_lm_head(twin).active
    patch_lm_head(twin).undo()
    assert "forward" not in vars(twin)


def test_hooks_of_a_device_map_keep_running(unchecked_shapes):
    accelerate = pytest.importorskip("accelerate", reason="its hooks are what is tested")
    model, tokens = build("qwen3"), batch()
    want = by_logits(model, tokens)
    devices = {"model": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    seen = []
    hook = model.lm_head._hf_hook
    pre_forward = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: (
        seen.append(args[0].shape) or pre_forward(module, *args, **kwargs)
    )
    with patch_lm_head(model) as patch:
        assert patch_lm_head(model) is patch
        found = model(**tokens)
    assert seen == [(3, 11, 16)]
    assert isinstance(found, LogprobEntropyOutput)
    torch.testing.assert_close(found.logprob, want["logprob"])
    hook.offload = True
    with pytest.raises(ValueError, match="offloaded"):
        patch_lm_head(model)


class Clamped(Qwen3ForCausalLM):
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits.clamp(-20, 20)
        return output


class Masked(Qwen3ForCausalLM):
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits[..., -3:] = torch.finfo(output.logits.dtype).min
        return output


class Skipping(Qwen3ForCausalLM):
    def forward(self, *args, **options):
        hidden = self.model(*args, **options).last_hidden_state
        return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


class Doubled(nn.Linear):
    def forward(self, hidden):
        return super().forward(2 * hidden)


def with_doubled_head(config):
    model = Qwen3ForCausalLM(config)
    model.lm_head = Doubled(16, VOCABULARY, bias=False)
    return model


REFUSED = {
    "clamped": (lambda config: Clamped(config), r"Clamped does to its logits.*softcap=20\.0"),
    "masked": (lambda config: Masked(config), r"Masked does to its logits.*makes -1\.79769e\+308"),
    "not called": (lambda config: Skipping(config), "Skipping"),
    "another head": (lambda config: with_doubled_head(config), "got Doubled"),
    "encoder and decoder": (
        lambda config: T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "T5ForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(case):
    make, message = REFUSED[case]
    model = make(build("qwen3").config)
    with pytest.raises(ValueError, match=message):
        patch_lm_head(model)
    assert "forward" not in vars(model)


def test_what_a_call_cannot_honour():
    model, tokens = build("qwen3"), batch()
    target = tokens.pop("target")
    with patch_lm_head(model):
        with pytest.raises(ValueError, match="labels"):
            model(**tokens, target=target, labels=target)
        with pytest.raises(ValueError, match="target=None"):
            model(**tokens, temperature=0.5)
        with pytest.raises(ValueError, match="target=None"):
            model(**tokens, statistics=("max_prob",))
        with pytest.raises(ValueError, match="target=None"):
            model(**tokens, token_ids=target)
        with pytest.raises(ValueError, match=r"must be fp32; got torch\.bfloat16"):
            model(**tokens, target=target, temperature=torch.ones(3, 11, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="return_dict"):
            model(**tokens, target=target, return_dict=False)
        # After an error nothing is left over for the next call.
        assert model(**tokens).logits.shape == (3, 11, VOCABULARY)
        model.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        with pytest.raises(ValueError, match="was replaced since"):
            model(**tokens, target=target)
