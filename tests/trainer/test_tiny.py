"""The tiny policy and its tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.tasks.ladder import Ladder
from trainer.tiny.model import CHARACTERS, NUMBERS, build_tiny, build_tokenizer

TOKENIZER = build_tokenizer()


def test_size():
    model, tokenizer = build_tiny(0)
    assert sum(weight.numel() for weight in model.parameters()) == 343_392
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == 112
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"


def test_seed_fixes_the_weights_and_spares_the_global_state():
    before = torch.get_rng_state()
    first, again, other = (build_tiny(seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first[embedding], other[embedding])


def test_attention_and_dtype():
    model, _ = build_tiny(0, attention="sdpa", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_one_computes_the_same_bits(tmp_path, dtype):
    model, _ = build_tiny(0, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager"
    )
    tokens = torch.arange(100)[None]
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_every_number_is_one_token():
    tokens = [TOKENIZER.encode(token) for token in NUMBERS + CHARACTERS]
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == 110


@given(st.text(alphabet="0123456789+-*=>:,!? "))
def test_decoding_gives_the_text_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    ended = [TOKENIZER.pad_token_id, *ids, TOKENIZER.eos_token_id]
    assert TOKENIZER.decode(ended, skip_special_tokens=True) == text


def test_ladder_prompts_are_11_tokens_and_responses_fit():
    pairs = Ladder(0).demonstrations(500, seed=0)
    assert {len(TOKENIZER.encode(problem.prompt)) for problem, _ in pairs} == {11}
    assert max(len(TOKENIZER.encode(response)) for _, response in pairs) == 36


def test_other_characters_are_refused():
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER.encode("17 / 3")


def test_folder_round_trip(tmp_path):
    model, tokenizer = build_tiny(3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "17>18 +4-3*3:17+4=21,21-3=18!"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    batch = loaded(["1>2", "17>18"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [1, 1, 1]]
    assert loaded(["1", "17>18"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
