"""The shapes that decide memory and flops, for dense decoders with a gated MLP.

D hidden, I intermediate, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """A dense decoder: grouped-query attention, RMSNorm, gated MLP, no biases but of q, k and v."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    """Whether the head is the embedding."""
    positions: int | None = None
    """The longest sequence that it is made for; None: any."""
    qk_norm: bool = True
    """Whether queries and keys are normalised, each by head_dim weights."""
    qkv_bias: bool = False

    @property
    def attention_matrices(self) -> int:
        """Weights of q, k, v and o of one layer."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights that a token is multiplied by in one layer."""
        return self.attention_matrices + 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        return self.layer_matrices + norms + bias

    @property
    def head(self) -> int:
        """Weights of the head, V x D."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside of the layers: embedding, head where it is another, last norm."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.outside


# Vocabulary, D, layers, heads, kv heads, head dim, I, tied, positions: from each model's config
# on the hub; of Qwen3 the base models. The tests build them all and count.
ARCHITECTURES = {
    "qwen3-0.6b": Architecture(151_936, 1024, 28, 16, 8, 128, 3072, True, 32_768),
    "qwen3-1.7b": Architecture(151_936, 2048, 28, 16, 8, 128, 6144, True, 32_768),
    "qwen3-4b": Architecture(151_936, 2560, 36, 32, 8, 128, 9728, True, 32_768),
    "qwen3-8b": Architecture(151_936, 4096, 36, 32, 8, 128, 12_288, False, 32_768),
    "qwen3-14b": Architecture(151_936, 5120, 40, 40, 8, 128, 17_408, False, 32_768),
    "qwen3-32b": Architecture(151_936, 5120, 64, 64, 8, 128, 25_600, False, 40_960),
    "llama-3.1-8b": Architecture(
        *(128_256, 4096, 32, 32, 8, 128, 14_336, False, 131_072), qk_norm=False
    ),
    "tiny": Architecture(112, 96, 3, 3, 3, 32, 256, True, 128),
}
_ALSO_NAMED = {"llama-8b": "llama-3.1-8b"}


def find_architecture(*names: str) -> Architecture:
    """The architecture of the first of `names` that is a folder or contains a known name.

    Raises ValueError where none does, and for a folder whose model is of another kind.
    """
    known = {name: name for name in ARCHITECTURES} | _ALSO_NAMED
    for name in names:
        if (Path(name) / "config.json").is_file():
            return from_folder(Path(name))
        inside = [known[key] for key in known if key in name.lower()]
        if inside:
            return ARCHITECTURES[max(inside, key=len)]
    raise ValueError(
        f"no architecture is known for {' or '.join(map(repr, filter(None, names)))}; wanted a "
        f"transformers folder or a name with one of {', '.join(known)} in it"
    )


def from_folder(folder: Path) -> Architecture:
    """The architecture of a transformers folder; its weights are not read.

    Raises ValueError for a model whose parameters are not those of a dense decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {name.rpartition(".layers.0.")[2] for name, _ in model.named_parameters()}
    try:
        found = Architecture(
            vocabulary=text.vocab_size,
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
            tied=bool(text.tie_word_embeddings),
            positions=getattr(text, "max_position_embeddings", None),
            qk_norm="self_attn.q_norm.weight" in names,
            qkv_bias="self_attn.q_proj.bias" in names,
        )
    except AttributeError as error:
        raise ValueError(f"{folder} holds no dense decoder: {error}") from error
    counted = sum(parameter.numel() for parameter in model.parameters())
    if counted != found.parameters:
        raise ValueError(
            f"{folder} holds a {type(model).__name__} of {counted:,} parameters; a dense decoder "
            f"with a gated MLP of its configuration has {found.parameters:,}"
        )
    return found
