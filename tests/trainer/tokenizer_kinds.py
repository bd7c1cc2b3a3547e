"""Kinds of tokenizers, as families of models have them, made of a few letters."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast


def byte_level(**named):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer, **named)


def pieces_of_sentences(prefix=True, **named):
    """As sentencepiece: a space is a letter of its own, and in front of a text; bytes behind."""
    letters = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgh123+=,", "▁a", "▁1"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = [("▁", "a"), ("▁", "1")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return finish(tokenizer, **named)


def unigram(**named):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0), ("▁a", -1), ("▁1", -1), ("+", -2)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return finish(tokenizer, **named)


def word_pieces(**named):
    words = {word: i for i, word in enumerate(["[UNK]", "a", "##b", "1", "+", ","])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return finish(tokenizer, **named)


def finish(tokenizer, special=(), front=(), behind=(), template=None, **named):
    """With special tokens, of which some are put in front of a text, or behind it."""
    known = {value for key, value in named.items() if key.endswith("_token")}
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in [*sorted(known), *special]])
    if front or behind:
        tokens = [*front, "$A", *behind]
        ids = [(token, tokenizer.token_to_id(token)) for token in (*front, *behind)]
        tokenizer.post_processor = processors.TemplateProcessing(" ".join(tokens), None, ids)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    made.chat_template = template
    return made


@dataclass
class Kind:
    """A tokenizer, and what tokenizer_kinds.yaml says of it."""

    tokenizer: PreTrainedTokenizerFast
    raw: list[str]
    ends: list[str]
    chat: list[str]
    chat_ends: list[str]
    generation: list[str]
    response: str
    text: str


def read_kind(said):
    def tokens(name):
        return said.get(name, "").split()

    options = said["named"] | {name: tokens(name) for name in ("special", "front", "behind")}
    tokenizer = MODELS[said["model"]](template=said.get("template"), **options)
    lists = map(tokens, ("raw", "ends", "chat", "chat_ends", "generation"))
    response = said.get("response", "1 + a")
    return Kind(tokenizer, *lists, response, said.get("text", response))


MODELS = {
    "byte_level": byte_level,
    "pieces_of_sentences": pieces_of_sentences,
    "pieces_without_a_prefix": partial(pieces_of_sentences, prefix=False),
    "unigram": unigram,
    "word_pieces": word_pieces,
}
TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
KINDS = {name: read_kind(said) for name, said in TABLE.items()}
