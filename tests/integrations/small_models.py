"""Causal LMs of many families, small and random, and what their own logits say of a batch.

B sequences, L their length, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations.hf import lm_head, patch_lm_head

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# What each does to h W^T: nothing; a bound; a factor, under names that mean a factor here and a
# divisor there; a bias.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"tie_word_embeddings": True, "final_logit_softcapping": 2.0}),
    "cohere": ("Cohere", {"tie_word_embeddings": True, "logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 0.3}),
    "nanochat": ("NanoChat", {"final_logit_softcapping": 2.5}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Its base_model is itself; a mixture too.
    "llama4": ("Llama4", {"num_local_experts": 2, "intermediate_size_mlp": 32}),
    # A layer of its own between the backbone and the head.
    "modernbert": ("ModernBertDecoder", {"bos_token_id": 1, "eos_token_id": 2}),
    "phi": ("Phi", {}),
    # States are divided before the head; the backbone is named by no `base_model`, or "gpt_neox".
    "minicpm3": (
        "MiniCPM3",
        {
            "dim_model_base": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 2,
        },
    ),
    "mllama": ("Mllama", {"cross_attention_layers": [], "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": ("GPTNeoX", {}),
    # Inside of a model of images and text; of two of them, the second is a causal LM of its own.
    "gemma3-images": (
        "Gemma3ForConditionalGeneration",
        {"tie_word_embeddings": True, "final_logit_softcapping": 2.0},
    ),
    "llama4-images": (
        "Llama4ForConditionalGeneration",
        {"num_local_experts": 2, "intermediate_size_mlp": 32},
    ),
    "gpt2": ("GPT2", {"tie_word_embeddings": True}),
}


_TEXT = ("Gemma3", "Llama4", "Mllama")
_IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


def has(family: str) -> bool:
    """Whether this version of transformers has the family."""
    name = FAMILIES[family][0].removesuffix("ForConditionalGeneration")
    return hasattr(transformers, f"{name}PreTrainedModel")


def build(family: str, seed: int = 0, spread: float = 0.4, **changes: Any) -> Any:
    """A model whose logits differ by a few, and whose head's bias, if any, is not zero."""
    name, own = FAMILIES[family]
    kind = name.removesuffix("ForConditionalGeneration")
    config = f"{kind}TextConfig" if kind in _TEXT else f"{kind}Config"
    model = name if name != kind else {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = getattr(transformers, config)(
            **_COMMON | {"initializer_range": spread} | own | changes
        )
        if name != kind:
            settings = getattr(transformers, f"{kind}Config")(
                text_config=settings,
                vision_config=_IMAGES,
                tie_word_embeddings=settings.tie_word_embeddings,
                attn_implementation="eager",
            )
        built = getattr(transformers, model)(settings).eval()
        bias = getattr(built.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
    return built


def batch(seed: int = 1, sequences: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Left-padded sequences and the token after each position; none for padding and for the last
    position, and for a few more."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(1, VOCABULARY, (sequences, length), generator=generator)
    mask_BL = torch.arange(length) >= torch.arange(sequences)[:, None]
    target_BL = tokens_BL.roll(-1, 1).masked_fill(~mask_BL, -100)
    target_BL[:, -1] = -100
    target_BL[0, 2:5] = -100
    return {"input_ids": tokens_BL, "attention_mask": mask_BL.long(), "target": target_BL}


def by_logits(model: Any, tokens: dict[str, Tensor], temperature: Any = 1.0) -> dict[str, Tensor]:
    """The same of the model's logits, in their precision; zero where there is no target."""
    tokens = dict(tokens)
    target_BL = tokens.pop("target")
    z_BLV = model(**tokens, use_cache=False).logits
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    logp_BLV = (z_BLV / temperature).log_softmax(-1)
    none_BL = target_BL == -100
    picked_BL = logp_BLV.gather(-1, target_BL.masked_fill(none_BL, 0)[..., None])[..., 0]
    found = {
        "logprob": picked_BL,
        "entropy": torch.special.entr(logp_BLV.exp()).sum(-1),
        "logsumexp": (z_BLV / temperature).logsumexp(-1),
    }
    return {name: x.masked_fill(none_BL, 0.0) for name, x in found.items()}


def by_head(model: Any, tokens: dict[str, Tensor], temperature: Any = 1.0, **options: Any) -> Any:
    """What a training loop of one's own does."""
    head, inputs = lm_head(model), {name: x for name, x in tokens.items() if name != "target"}
    states = head(head.hidden_states(**inputs, **options), tokens["target"], temperature)
    return ek.linear_logprob_entropy(states)._asdict()


def by_patch(model: Any, tokens: dict[str, Tensor], temperature: Any = 1.0, **options: Any) -> Any:
    """What the patched model returns; the patch stays."""
    patch_lm_head(model)
    return model(**tokens, temperature=temperature, **options)


def by_head_under_the_patch(model: Any, tokens: dict[str, Tensor], temperature: Any = 1.0) -> Any:
    """The head is found although the model is patched."""
    patch_lm_head(model)
    return by_head(model, tokens, temperature)


@contextmanager
def head_in_fp64(model: Any) -> Iterator[None]:
    """A plain linear head's product in fp64, and so all that follows it."""
    head = model.get_output_embeddings()

    def product(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.double()
        return F.linear(hidden.double(), head.weight.double(), bias)

    head.forward = product
    try:
        yield
    finally:
        del head.forward


def gradients(model: Any, found: Any, share: tuple[int, int] = (1, 0)) -> dict[str, Tensor | None]:
    """Gradients of a weighted sum of log-probs and entropies, by the parameters' names.

    share: how many processes have a part of the sequences, and which part this is.
    """
    generator = torch.Generator().manual_seed(4)
    parts, part = share
    sequences, length = found["logprob"].shape
    weights = torch.randn(3, parts * sequences, length, generator=generator).chunk(parts, 1)
    a, b, c = weights[part]
    loss = (a * found["logprob"]).sum() + (b * found["entropy"]).sum()
    (loss + 0.1 * (c * found["logsumexp"]).sum()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


def assert_as_in_fp64(
    route: Callable[..., Any], model: Any, tokens: dict[str, Tensor], temperature: Any = 1.0
) -> Any:
    """Values and gradients by `route` are those of the logits, the head's product in fp64."""
    with head_in_fp64(model):
        want = by_logits(model, tokens, temperature)
        want_grads = gradients(model, want)
    found = route(model, tokens, temperature)
    for name, truth in want.items():
        assert found[name].dtype == torch.float32
        # A model may round its logits to fp32.
        torch.testing.assert_close(found[name].double(), truth.double(), rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(model, found), want_grads)
    return found


def fill_lora(model: Any) -> Any:
    """Updates that are not zero in place of PEFT's."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def assert_same_gradients(got: dict[str, Any], want: dict[str, Any], digits: float = 2e-5) -> None:
    """Each within `digits` of the largest of its parameter, and some not zero."""
    assert got.keys() == want.keys()
    assert any(x is not None and x.abs().max() > 1e-3 for x in want.values())
    for name, truth in want.items():
        assert (got[name] is None) == (truth is None), name
        if truth is not None:
            # A gradient that is zero in exact arithmetic, as of a key's bias, has no scale.
            scale = max(float(truth.abs().max()), 1e-3)
            torch.testing.assert_close(
                got[name], truth, rtol=0, atol=digits * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
