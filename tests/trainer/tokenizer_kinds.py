"""Kinds of tokenizers, as families of models have them, made of a few letters."""

from dataclasses import dataclass, field

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

TURNS = (
    "{{% for m in messages %}}{start}{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}{end}\n"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{start}assistant\n{{% endif %}}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
DEEP = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}"
    "{% else %}<A>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)


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
    """A tokenizer, and for the question "a 1": its tokens raw, those of the template, what ends a
    response; and a response with its text."""

    tokenizer: PreTrainedTokenizerFast
    raw: list[str]
    ends: list[str]
    chat: list[str] | None = None
    chat_ends: list[str] = field(default_factory=list)
    response: str = "1 + a"
    text: str = "1 + a"
    generation: tuple[str, ...] = ()


KINDS = {
    "GPT-2": Kind(byte_level(eos_token="<|endoftext|>"), ["a", "Ġ", "1"], ["<|endoftext|>"]),
    "Llama 3": Kind(
        byte_level(
            bos_token="<|begin|>",
            eos_token="<|end|>",
            special=["<|eot|>"],
            front=["<|begin|>"],
            template="{{ bos_token }}" + TURNS.format(start="", end="<|eot|>"),
        ),
        ["<|begin|>", "a", "Ġ", "1"],
        ["<|end|>"],
        ["<|begin|>", *"user", "Ċ", "a", "Ġ", "1", "<|eot|>", "Ċ", *"assistant", "Ċ"],
        ["<|end|>", "<|eot|>"],
    ),
    "Llama 2": Kind(
        pieces_of_sentences(bos_token="<s>", eos_token="</s>", front=["<s>"], behind=["</s>"]),
        ["<s>", "▁a", "▁1"],
        ["</s>"],
        response="1 + é",
        text="1 + é",
    ),
    "Gemma": Kind(
        pieces_of_sentences(
            prefix=False,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            special=["<turn>", "</turn>"],
            front=["<bos>"],
            template="{{ bos_token }}" + TURNS.format(start="<turn>", end="</turn>"),
        ),
        ["<bos>", "a", "▁1"],
        ["<eos>"],
        # Letters it does not know are bytes.
        ["<bos>", "<turn>", "<0x75>", "<0x73>", "e", "<0x72>", "<0x0A>", "a", "▁1", "</turn>"]
        + ["<0x0A>", "<turn>", "a", "<0x73>", "<0x73>", "<0x69>", "<0x73>", "<0x74>", "a"]
        + ["<0x6E>", "<0x74>", "<0x0A>"],
        ["<eos>", "</turn>"],
    ),
    "Qwen": Kind(
        byte_level(
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            special=["<|im_start|>"],
            template=TURNS.format(start="<|im_start|>", end="<|im_end|>"),
        ),
        ["a", "Ġ", "1"],
        ["<|im_end|>", "<|endoftext|>"],
        ["<|im_start|>", *"user", "Ċ", "a", "Ġ", "1", "<|im_end|>", "Ċ", "<|im_start|>"]
        + [*"assistant", "Ċ"],
        ["<|im_end|>", "<|endoftext|>"],
        generation=("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen's base with a template": Kind(
        byte_level(
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            special=["<|im_start|>", "<|im_end|>"],
            template=TURNS.format(start="<|im_start|>", end="<|im_end|>"),
        ),
        ["a", "Ġ", "1"],
        ["<|endoftext|>"],
        ["<|im_start|>", *"user", "Ċ", "a", "Ġ", "1", "<|im_end|>", "Ċ", "<|im_start|>"]
        + [*"assistant", "Ċ"],
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "T5": Kind(
        unigram(eos_token="</s>", unk_token="<unk>", pad_token="<pad>", behind=["</s>"]),
        ["▁a", "▁1"],
        ["</s>"],
        response="1 a",
        text="1 a",
    ),
    "Phi": Kind(
        byte_level(
            eos_token="<|endoftext|>",
            special=["<|user|>", "<|assistant|>", "<|end|>"],
            template="{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ),
        ["a", "Ġ", "1"],
        ["<|endoftext|>"],
        ["<|user|>", "a", "Ġ", "1", "<|end|>", "<|assistant|>"],
        ["<|endoftext|>", "<|end|>"],
    ),
    "Mistral": Kind(
        pieces_of_sentences(
            bos_token="<s>",
            eos_token="</s>",
            special=["[INST]", "[/INST]"],
            front=["<s>"],
            template=NO_SYSTEM,
        ),
        ["<s>", "▁a", "▁1"],
        ["</s>"],
        ["<s>", "[INST]", "▁a", "▁1", "[/INST]"],
        ["</s>"],
    ),
    "WordPiece": Kind(
        word_pieces(
            cls_token="[CLS]",
            eos_token="[SEP]",
            pad_token="[PAD]",
            unk_token="[UNK]",
            front=["[CLS]"],
            behind=["[SEP]"],
        ),
        ["[CLS]", "a", "1"],
        ["[SEP]"],
        response="1 + ab",
        text="1 + ab",
    ),
    "words of an answer": Kind(
        byte_level(eos_token="<eos>", pad_token="<pad>", special=["<answer>", "</answer>"]),
        ["a", "Ġ", "1"],
        ["<eos>"],
        response="<answer>1</answer>",
        text="1",
    ),
    "DeepSeek": Kind(
        byte_level(
            bos_token="<bos>",
            eos_token="<eos>",
            special=["<U>", "<A>"],
            front=["<bos>"],
            template=DEEP,
        ),
        ["<bos>", "a", "Ġ", "1"],
        ["<eos>"],
        ["<bos>", "<U>", "a", "Ġ", "1", "<A>"],
        ["<eos>"],
    ),
}
