"""Kinds of tokenizers, each with the tokens of a prompt, what ends a response, and its text."""

import copy
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
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

from tests.trainer.small import Even, build_policy, build_tokenizer
from trainer.config import Data, Reward
from trainer.engines import Sampled
from trainer.problems import Problem
from trainer.rewards.verifier import Verifier
from trainer.rollout import sample
from trainer.tasks.render import pose, render
from trainer.tokens import end_ids, pieces, prompt_ids, response_ids, response_text

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


ANSWERS = ["1", " ", "+", " ", "a"]
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
NAMES = sorted(KINDS)


def tokens_of(tokenizer, problem):
    return tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, [problem])[0])


def model_of(kind, default=None):
    ids = kind.tokenizer.convert_tokens_to_ids(list(kind.generation)) or None
    config = SimpleNamespace(eos_token_id=default)
    config.get_text_config = lambda: config
    generation = SimpleNamespace(eos_token_id=ids)
    return SimpleNamespace(config=config, generation_config=generation)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_starts_as_the_tokenizer_starts_a_text_and_does_not_end(name):
    kind = KINDS[name]
    assert tokens_of(kind.tokenizer, Problem("a 1", None)) == kind.raw
    raw = pose(kind.tokenizer, "a 1", "2", Data(template="none"))
    assert raw == Problem("a 1", "2", templated=False)
    started = (kind.tokenizer.bos_token or "") + "a 1"
    first = tokens_of(kind.tokenizer, Problem(started, None))
    assert first.count(kind.tokenizer.bos_token) == kind.raw.count(kind.tokenizer.bos_token)


@pytest.mark.parametrize("name", [name for name in NAMES if KINDS[name].chat])
def test_a_chat_templates_special_tokens_are_those_it_writes(name):
    kind = KINDS[name]
    posed = pose(kind.tokenizer, "a 1", "2", Data())
    assert posed.templated
    assert tokens_of(kind.tokenizer, posed) == kind.chat
    assert posed == Problem(**json.loads(json.dumps(vars(posed))))


@pytest.mark.parametrize("name", NAMES)
def test_what_ends_a_response(name):
    kind, to_ids = KINDS[name], KINDS[name].tokenizer.convert_tokens_to_ids
    # 2 is the default of many configurations, and the first letter of these tokenizers.
    for chat, ends in ((False, kind.ends), (True, kind.chat_ends or kind.ends)):
        assert end_ids(kind.tokenizer, model_of(kind, 2), chat) == sorted(to_ids(ends))


@pytest.mark.parametrize("name", NAMES)
def test_a_response_is_read_as_it_was_written(name):
    kind = KINDS[name]
    tokens = response_ids(kind.tokenizer, kind.response)
    assert not set(kind.tokenizer.convert_tokens_to_ids(kind.ends)) & set(tokens)
    ends = kind.tokenizer.convert_tokens_to_ids(kind.ends)
    assert response_text(kind.tokenizer, tokens, ends, keep_special=False) == kind.text
    assert response_text(kind.tokenizer, tokens, ends, keep_special=True) == kind.response
    padded = [*tokens, *ends]
    assert response_text(kind.tokenizer, padded, ends, keep_special=True) == kind.response
    shown = pieces(kind.tokenizer, tokens)
    assert len(shown) == len(tokens)
    assert "".join(shown) == kind.tokenizer.decode(tokens)


def test_a_character_of_several_tokens_is_shown_at_its_last():
    tokenizer = KINDS["GPT-2"].tokenizer
    tokens = response_ids(tokenizer, "é a€")
    assert pieces(tokenizer, tokens) == ["", "é", " ", "a", "", "", "€"]
    assert pieces(tokenizer, tokens[:-1]) == ["", "é", " ", "a", "", "\ufffd"]
    letters = pieces_of_sentences()
    assert pieces(letters, response_ids(letters, "1 a b")) == ["1", " a", " ", "b"]


def test_the_llama_presets_template_gives_one_token_of_begin():
    tokenizer = KINDS["Llama 3"].tokenizer
    template = "<|begin|>Q: {question}"
    posed = pose(tokenizer, "1", "1", Data(template=template))
    assert tokens_of(tokenizer, posed) == ["<|begin|>", "Q", ":", "Ġ", "1"]
    assert tokens_of(tokenizer, pose(tokenizer, "1", "1", Data(template="Q{question}"))) == (
        ["<|begin|>", "Q", "1"]
    )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "alternate"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "alternate"),
    ],
)
def test_what_a_chat_template_refuses_is_named(prompt, said):
    with pytest.raises(
        ValueError, match=rf"does not take the prompt \[.*'content': 'y'.*{said}; set data.template"
    ):
        render(KINDS["Mistral"].tokenizer, prompt, Data())


def test_a_chat_template_that_cannot_be_read_is_named():
    tokenizer = copy.deepcopy(KINDS["Qwen"].tokenizer)
    for template in ("{% for %}", "{{ messages[0].content.nothing.more }}", "{{ 1 + 'a' }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template does not take the prompt"):
            render(tokenizer, "a", Data())


@pytest.mark.parametrize("name", ["GPT-2", "Qwen", "T5"])
def test_a_prompt_without_a_token_is_refused(name):
    with pytest.raises(ValueError, match=r"must have tokens to continue; got '' \(answer: '7'\)"):
        prompt_ids(KINDS[name].tokenizer, [Problem("1", "1"), Problem("", "7")])


class Fixed:
    """An engine that answers with given tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def sample(self, prompts, seeds, **options):
        self.prompts = prompts
        return [Sampled(torch.tensor(self.tokens), torch.zeros(len(self.tokens))) for _ in prompts]


@pytest.mark.parametrize(("keep", "text"), [(False, "1 1"), (True, "<user> 1 1 <assistant>")])
def test_a_verifier_may_read_special_tokens(keep, text):
    policy = build_policy()
    policy.tokenizer = build_tokenizer(extra_special_tokens=["<user>", "<assistant>"])
    words = policy.tokenizer.convert_tokens_to_ids(["<user>", "1", "1", "<assistant>", "<eos>"])
    options = {"group_size": 1, "max_new_tokens": 5, "temperature": 1.0, "seed": 0}
    verifier = Verifier(Even(), Reward(keep_special_tokens=keep))
    rollouts = sample(Fixed(words), policy, verifier, [Problem("1", None)], **options)
    assert rollouts.responses == [text]


def test_a_run_begins_its_prompts_as_the_tokenizer_does():
    """From the problems to what the engine is given, and what training reads."""
    policy = build_policy()
    tokenizer = build_tokenizer(bos_token="<user>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<user> $A <eos>", None, [("<user>", 15), ("<eos>", 1)]
    )
    policy.tokenizer = tokenizer
    engine = Fixed([5, 1])
    problems = [Problem("1", None), Problem("<user> 1", None, templated=True)]
    options = {"group_size": 1, "max_new_tokens": 5, "temperature": 1.0, "seed": 0}
    rollouts = sample(engine, policy, Verifier(Even(), Reward()), problems, **options)
    assert engine.prompts == [[15, 4], [15, 4]]
    assert rollouts.prompt_BP.tolist() == [[15, 4], [15, 4]]
