"""The tiny policy: a Qwen3 of 343,392 parameters and its tokenizer, made for the number ladder.

Every number from 0 to 99 is one token: with a token per digit a model of this size does not learn
the arithmetic in the time a demonstration has.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS = "<pad>", "<eos>"
NUMBERS = [str(number) for number in range(100)]
CHARACTERS = list("+-*=>:,!? ")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """112 tokens: padding, end-of-sequence, the numbers 0 to 99 and ten characters.

    Pads on the left; decoding gives the text back to the character. It has no unknown token:
    text with any other character cannot be encoded.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *NUMBERS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    pieces = Regex(r"[1-9][0-9]|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def build_tiny(
    seed: int, attention: str = "eager", dtype: torch.dtype = torch.float32
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The untrained model, its weights fixed by `seed`, and its tokenizer.

    Leaves torch's global random state as it was.
    """
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # As in from_pretrained: positions stay fp32, which model.to(dtype) would round.
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model, tokenizer
