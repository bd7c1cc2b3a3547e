"""A small Gemma 3, of the kind that the studies on a pretrained model take."""

from pathlib import Path

import torch

from tests.trainer.tokenizer_kinds import byte_level


def save_gemma(folder: Path) -> Path:
    """The `folder` with a model of random weights and a tokenizer of bytes in it."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = byte_level(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", front=["<bos>"])
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    torch.nn.init.constant_(model.model.norm.weight, 5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
