"""Log-probs are a function of the sequence: of no other in its batch, of no noise, of no cache."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from tests.trainer.small import (
    EVEN,
    build_model,
    build_tokenizer,
    make_model,
    sampled,
    settings,
)
from tests.trainer.update_cases import ALONE
from trainer.advantages import group_advantages
from trainer.batch import Batch, pack
from trainer.config import Algorithm, Optimizer
from trainer.model.modes import checkpoint_activations
from trainer.model.rope import fixed_configuration
from trainer.policy import Policy, check_policy
from trainer.update import score, update

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 16.0, 64.0],
    "original_max_position_embeddings": 12,
}
PHI3 = {"rope_parameters": LONG, "original_max_position_embeddings": 12}
WORDS_APART = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
WORDS_APART |= {"num_layers": 2, "num_heads": 2}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}


YARN = rope("yarn", original_max_position_embeddings=16)
LLAMA3 = rope(
    "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
# A name, transformers' classes, their settings; what the layout is, and whether it can be sampled.
FAMILIES = [
    ("longrope", "Phi3", PHI3, "rows"),
    (
        "longrope of its own",
        "Phimoe",
        {"rope_parameters": LONG | {"short_mscale": 1.1, "long_mscale": 1.3}} | EXPERTS,
        "rows",
    ),
    ("dynamic", "Llama", rope("dynamic"), "rows"),
    ("yarn", "Llama", YARN, "rows"),
    ("linear", "Llama", rope("linear"), "rows"),
    ("llama3", "Llama", LLAMA3, "rows"),
    ("window", "Mistral", {"sliding_window": 4}, "rows"),
    ("window beyond the probe", "Mistral", {"sliding_window": 20}, "rows"),
    ("windows and none", "Gemma3Text", MIXED, "rows"),
    ("sinks", "GptOss", MIXED | EXPERTS, "padded"),
    ("window of words", "GPTNeo", WORDS_APART, "rows"),
    ("chunks", "Llama4Text", {"attention_chunk_size": 4, "intermediate_size_mlp": 32}, "padded"),
    ("one chunk", "Llama4Text", {"attention_chunk_size": 64, "intermediate_size_mlp": 32}, "rows"),
    ("experts with jitter", "Mixtral", EXPERTS | {"router_jitter_noise": 0.05}, "rows"),
    ("experts", "Qwen3Moe", EXPERTS, "rows"),
    ("shared experts", "Qwen2Moe", EXPERTS, "rows"),
    ("positions from 2 on", "OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}, "padded"),
    ("by distance", "Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}, "padded"),
    (
        "linear attention",
        "Qwen3Next",
        EXPERTS
        | {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        None,
    ),
    ("state space", "Bamba", {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}, None),
    ("convolution", "Lfm2", {"layer_types": ["conv", "full_attention"]}, None),
]


def build(name, own, **changes):
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    return make_model(name, **copy.deepcopy(heads | own | changes))


def make_policy(model):
    policy = Policy(model, build_tokenizer())
    check_policy(policy)
    policy.model.generation_config.eos_token_id = [1, 4]
    return policy


def roll(policy):
    """Responses of 1 to 40 tokens."""
    return sampled(policy, EVEN[:6], max_new_tokens=40, seed=2)


def scores(policy, rollouts, tokens):
    config = settings(Path(), optimizer=Optimizer(tokens_per_micro_batch=tokens))
    return torch.stack(score(policy, rollouts, config, ALONE)[:2])


def of_rounding(policy, rollouts, alone):
    """The change by weights that round otherwise, amplified by recurrence: no leak is as small."""
    nudged = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in nudged.model.parameters():
            weight.mul_(1 + torch.randn_like(weight) * torch.finfo(weight.dtype).eps / 2)
    change = (scores(nudged, rollouts, 1) - alone).abs().max().item()
    assert change < 1e-3
    return change


@pytest.fixture(scope="module")
def others():
    """Responses of a model that can be sampled, for those that cannot."""
    return roll(make_policy(build("Llama", {})))


@pytest.mark.parametrize(
    ("name", "own", "layout"), [x[1:] for x in FAMILIES], ids=[x[0] for x in FAMILIES]
)
def test_scores_depend_on_no_other_sequence_and_are_the_samplers(name, own, layout, others):
    policy = make_policy(build(name, own))
    if layout is None:
        assert policy.layout == "padded"
        says = (
            rf"{name}\w+ cannot be sampled: .* cache's .*(Linear|Conv|Mamba)\w+ cannot be dropped"
        )
        with pytest.raises(ValueError, match=says):
            roll(policy)
        rollouts = others
    else:
        assert policy.layout == layout
        rollouts = roll(policy)
        assert rollouts.response_length_B.max() > 12
    together, alone = scores(policy, rollouts, 10**6), scores(policy, rollouts, 1)
    bound = 2e-5 if layout else max(2e-5, of_rounding(policy, rollouts, alone))
    assert (together - alone).abs().max() < bound
    assert torch.equal(together, scores(policy, rollouts, 10**6))
    if layout is not None:
        difference = together[0] - rollouts.sampler_logprob_T
        assert difference.abs().max() < 5e-5


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("Mixtral", EXPERTS | {"router_jitter_noise": 0.5, "attention_dropout": 0.5}),
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.5}),
        ("GPT2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("Phimoe", EXPERTS | {"router_jitter_noise": 0.5}),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_1_where_nothing_is_learned(name, own, checkpointing):
    """Noise of training, under whatever name, would make it another policy than the sampler."""
    model = build_model("gpt2", **own) if name == "GPT2" else build(name, own)
    if checkpointing:
        checkpoint_activations(model)
    policy = make_policy(model)
    rollouts = roll(policy)
    config = settings(
        Path(),
        algorithm=Algorithm(fraction=1.0),
        optimizer=Optimizer(learning_rate=0.0, tokens_per_micro_batch=10**6),
    )
    logprob, entropy, threshold, _ = score(policy, rollouts, config, ALONE)
    advantage = group_advantages(torch.linspace(-1, 1, 24).square(), rollouts.group_B)
    batch = Batch(rollouts, advantage, logprob, entropy >= 0, threshold)
    before = copy.deepcopy(policy.model.state_dict())
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    metrics, _ = update(policy, optimizer, batch, config, ALONE)
    assert abs(metrics["ratio/max"] - 1) < 1e-5
    assert abs(metrics["ratio/mean"] - 1) < 1e-6
    assert metrics["grad_norm"] > 0
    after = policy.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_layers_recompute_in_training_alone():
    model = build("Llama", {"attention_dropout": 0.5})
    checkpoint_activations(model)
    policy = make_policy(model)
    calls = []
    layer = model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(layer.training))
    tokens = roll(policy)
    calls.clear()
    policy.train()
    hidden = policy(pack(tokens, "padded"), 1.0, lambda head: head.hidden)
    hidden.sum().backward()
    assert calls == [False, False]
    policy.train(False)
    policy(pack(tokens, "padded"), 1.0, lambda head: head.hidden).sum().backward()
    assert calls == [False] * 3


class Restless(transformers.LlamaForCausalLM):
    """Noisy in eval mode too."""

    def forward(self, input_ids, **options):
        with torch.no_grad():
            self.model.norm.weight.copy_(1 + 0.1 * torch.rand(16))
        return super().forward(input_ids, **options)


class Crowded(transformers.LlamaForCausalLM):
    """Positions of the whole batch."""

    def forward(self, input_ids, position_ids=None, **options):
        if position_ids is not None and position_ids.max() > 20:
            position_ids = 2 * position_ids
        return super().forward(input_ids, position_ids=position_ids, **options)


class Filling(transformers.LlamaForCausalLM):
    """Shares out room: half of a batch's tokens may be of one kind, the first that come."""

    def forward(self, input_ids, **options):
        flat = input_ids.flatten()
        taken = (flat[:, None] == flat).tril().sum(1)
        full = (2 * taken > len(flat)).view(input_ids.shape)
        return super().forward(input_ids.masked_fill(full, 3), **options)


class Widening(transformers.LlamaForCausalLM):
    """Positions by the width of the batch, padding and all."""

    def forward(self, input_ids, position_ids=None, **options):
        if position_ids is not None and input_ids.shape[1] > 9:
            position_ids = 2 * position_ids
        return super().forward(input_ids, position_ids=position_ids, **options)


class Remembering(transformers.LlamaForCausalLM):
    """Positions of the batches before."""

    longest = 0

    def forward(self, input_ids, position_ids=None, **options):
        if position_ids is not None:
            position_ids = position_ids * (2 if self.longest > 20 else 1)
            self.longest = max(self.longest, int(position_ids.max()))
        return super().forward(input_ids, position_ids=position_ids, **options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Restless, r"draws random numbers in eval mode; .*attention_dropout=0.25"),
        (Crowded, r"depend on how long the other sequences of its batch are"),
        (Filling, r"depend on the other sequences of its batch"),
        (Widening, r"depend on the other sequences of its batch"),
        (Remembering, r"depend on the batches before"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_no_function_of_the_sequence_are_refused(kind, message, dtype):
    model = build("Llama", {"attention_dropout": 0.25}).to(dtype)
    model.__class__ = kind
    with pytest.raises(ValueError, match=rf"{kind.__name__} cannot be trained: .*{message}"):
        check_policy(Policy(model, build_tokenizer()))


def test_states_that_are_not_finite_are_named_so():
    model = build("Llama", {})
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 3e38
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1e30)
    with pytest.raises(ValueError, match=r"its states in torch\.float32 are not finite"):
        check_policy(Policy(model, build_tokenizer()))


class Forgetful(transformers.LlamaForCausalLM):
    """Without a cache."""

    def forward(self, input_ids, past_key_values=None, attention_mask=None, **options):
        return super().forward(input_ids, **options)


def test_a_model_that_ignores_its_cache_is_not_sampled():
    model = build("Llama", {})
    model.__class__ = Forgetful
    with pytest.raises(ValueError, match=r"Forgetful cannot be sampled: token by token"):
        roll(make_policy(model))


@pytest.mark.parametrize(("asked", "factors"), [(0, "long"), (13, "long"), (12, "short")])
def test_longrope_is_scaled_for_the_longest_sequence_asked_for(asked, factors):
    model = build("Phi3", PHI3)
    policy = Policy(model, build_tokenizer(), asked)
    assert policy.longest == (asked or 64)
    tokens = torch.arange(6)[None]
    got = policy.model(tokens).logits
    plain = LONG | dict.fromkeys(("short_factor", "long_factor"), LONG[f"{factors}_factor"])
    assert torch.equal(got, build("Phi3", PHI3 | {"rope_parameters": plain})(tokens).logits)
    check_policy(policy)
    assert "longrope for" in policy.notes()[0]


def test_vllm_is_told_plain_positions_in_the_place_of_dynamic_ones():
    model = build("Llama", rope("dynamic"))
    policy = Policy(model, build_tokenizer(), 100)
    tokens = torch.arange(8)[None]
    want = policy.model(tokens).logits
    configuration = copy.deepcopy(model.config)
    fixed_configuration(configuration, policy.longest)
    assert configuration.max_position_embeddings == 100
    assert configuration.rope_parameters["rope_type"] == "default"
    other = type(model)(configuration).eval()
    other.load_state_dict(model.state_dict())
    assert (other(tokens).logits - want).abs().max() < 1e-5
    assert model.config.rope_parameters["rope_type"] == "dynamic"
