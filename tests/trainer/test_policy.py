"""The policy: hidden states of padded rollouts, and a head that is the model's own."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import entropy_kernels as ek
from tests.trainer.small import (
    EOS,
    EVEN,
    FAMILIES,
    WORDS,
    build_model,
    build_policy,
    build_tokenizer,
    load_policy,
    sampled,
    save_folder,
    sequences,
)
from trainer import policy as module
from trainer.batch import pack
from trainer.config import Model
from trainer.policy import Policy, read_policy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, attention)
        for family in FAMILIES
        for attention in ("eager", "sdpa")
        if attention == "eager" or family not in ("gemma2", "bloom")  # which have no sdpa
    ],
)
def test_log_probs_are_those_of_the_unpadded_sequence(family, attention):
    """Position and padding by position: each response alone, through the model's own logits."""
    policy = build_policy(family, attention=attention)
    policy.model.generation_config.eos_token_id = [1, 4, 7]
    rollouts = sampled(policy, EVEN[:6], group_size=2, max_new_tokens=9, seed=2)
    assert len(rollouts.response_length_B.unique()) >= 3
    with torch.no_grad():
        packed = pack(rollouts, policy.layout)
        got_T = policy(packed, 0.7, lambda head: ek.linear_logprob_entropy(head).logprob)
        for got, (prompt, response) in zip(rollouts.split(got_T), sequences(rollouts), strict=True):
            logits = policy.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 :]
            logp = (logits[:-1].double() / 0.7).log_softmax(1)
            want = logp.gather(1, response[:, None]).squeeze(1)
            error = (got - want).abs().max()
            assert error <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_load_from_a_folder(family, dtype, tmp_path):
    path = save_folder(tmp_path, family)
    policy = load_policy(Model(path=path, dtype=dtype))
    assert policy.model.dtype == getattr(torch, dtype)
    want = build_model(family).to(policy.model.dtype).state_dict()
    got = policy.model.state_dict()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert policy.tokenizer.padding_side == "left"
    assert policy.eos_ids.tolist() == [WORDS.index(EOS)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_empty_model_has_all_but_the_values_of_the_weights(family, tmp_path):
    path = save_folder(tmp_path, family)
    want = read_policy(Model(path=path, dtype="bfloat16"), 0).model
    policy = read_policy(Model(path=path, dtype="bfloat16"), 0, empty=True)
    got = policy.model
    assert {p.device.type for p in got.parameters()} == {"meta"}
    assert not any(module.training for module in got.modules())
    policy.materialize(CPU)
    tensors = (dict(model.named_parameters()) for model in (got, want))
    shapes = [
        {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in t.items()} for t in tensors
    ]
    assert shapes[0] == shapes[1]
    buffers, wanted = dict(got.named_buffers()), dict(want.named_buffers())
    assert buffers.keys() == wanted.keys()
    assert all(torch.equal(buffers[name], value) for name, value in wanted.items())
    got.load_state_dict(want.state_dict())
    tokens = torch.arange(8)[None]
    assert torch.equal(got(tokens).logits, want(tokens).logits)


class Louder(LlamaForCausalLM):
    """Its logits are a factor larger than its configuration says, from some length on."""

    factor, length = 1.01, 0

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        factor = self.factor if output.logits.shape[1] >= self.length else 1.0
        return CausalLMOutputWithPast(logits=factor * output.logits)


def louder(dtype, spread, **attributes):
    model = build_model(spread=spread).to(dtype)
    model.__class__ = type("Louder", (Louder,), attributes)
    return Policy(model, build_tokenizer())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.2)])
@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_a_factor_is_measured_and_not_read(dtype, factor, spread):
    policy = louder(dtype, spread, factor=factor)
    module._check_head(policy, "torch")
    assert policy.lm_head.scale == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.2)])
@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_another_head_than_was_measured_is_refused(dtype, factor, spread):
    policy = louder(dtype, spread, factor=factor, length=8)
    with pytest.raises(ValueError, match=r"head of Louder .* log-probs differ by"):
        module._check_head(policy, "torch")


def test_dropout_is_off_in_training(tmp_path):
    """GPT-2's configuration drops a tenth of everything by default."""
    path = save_folder(tmp_path, "gpt2")
    model = load_policy(Model(path=path)).model.train()
    tokens = torch.arange(8)[None]
    first, second = model(tokens).logits, model(tokens).logits
    assert torch.equal(first, second)
    assert torch.equal(first, build_model("gpt2")(tokens).logits)


def test_a_tokenizer_without_padding_pads_with_the_end_of_sequence(tmp_path):
    path = save_folder(tmp_path)
    build_tokenizer(pad_token=None).save_pretrained(tmp_path)
    policy = load_policy(Model(path=path))
    assert policy.tokenizer.pad_token_id == WORDS.index(EOS)
    encoded = policy.tokenizer(["1 2 3", "4"], padding=True)
    assert encoded["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


def test_what_cannot_be_loaded_is_named(tmp_path):
    missing = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing"):
        load_policy(Model(path=missing))
    path = save_folder(tmp_path)
    build_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        load_policy(Model(path=path))


def test_the_end_of_sequence_is_all_that_generation_tokenizer_and_model_name():
    policy = build_policy()
    for named, ends in (([1, 7], [1, 7]), (0, [0, 1]), (None, [1])):
        policy.model.generation_config.eos_token_id = named
        assert policy.eos_ids.tolist() == ends
    policy.model.config.eos_token_id, policy.model.generation_config.eos_token_id = None, [7]
    assert policy.eos_ids.tolist() == [1, 7]
    policy.model.generation_config.eos_token_id = None
    # A configuration's may be its class's default: it counts where the tokenizer knows it.
    for named, ends in ((5, [1]), ([0, 5], [0, 1]), (None, [1])):
        policy.model.config.eos_token_id = named
        assert policy.eos_ids.tolist() == ends
