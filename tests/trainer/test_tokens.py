"""Kinds of tokenizers, each with the tokens of a prompt, what ends a response, and its text."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors

from tests.trainer.small import Even, build_policy, build_tokenizer, sampled
from tests.trainer.tokenizer_kinds import KINDS, byte_level, pieces_of_sentences
from trainer.config import Data, Reward
from trainer.engines.engine import Sampled
from trainer.model.tokens import end_ids, pieces, prompt_ids, response_ids, response_text
from trainer.rewards.verifier import Verifier
from trainer.tasks.problem import Problem
from trainer.tasks.render import pose, render

NAMES = sorted(KINDS)


def tokens_of(tokenizer, problem):
    return tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, [problem])[0])


def model_of(tokenizer, generation=(), default=None):
    ids = tokenizer.convert_tokens_to_ids(list(generation)) or None
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
    model = model_of(kind.tokenizer, kind.generation, 2)
    for chat, ends in ((False, kind.ends), (True, kind.chat_ends or kind.ends)):
        assert end_ids(kind.tokenizer, model, chat) == sorted(to_ids(ends))


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


def test_a_text_that_begins_as_the_tokenizer_does_gets_nothing_in_front():
    tokenizer = byte_level(bos_token="<b>", eos_token="<e>", special=["<c>"], front=["<b>", "<c>"])
    assert tokens_of(tokenizer, Problem("a", None)) == ["<b>", "<c>", "a"]
    assert tokens_of(tokenizer, Problem("<b><c>a", None)) == ["<b>", "<c>", "a"]
    assert tokens_of(tokenizer, Problem("<b>a", None)) == ["<b>", "a"]


def test_a_template_that_changes_words_tells_no_end_of_turn():
    """The start of a turn, which comes first in its text, ends nothing."""
    template = "{% for m in messages %}<s>{{ m['content'] | upper }}<t>{% endfor %}"
    tokenizer = byte_level(eos_token="<e>", special=["<s>", "<t>"], template=template)
    ends = end_ids(tokenizer, model_of(tokenizer), True)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<e>"]


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
        nothing = torch.zeros(len(self.tokens))
        return [Sampled(torch.tensor(self.tokens), nothing, nothing) for _ in prompts]


@pytest.mark.parametrize(("keep", "text"), [(False, "1 1"), (True, "<user> 1 1 <assistant>")])
def test_a_verifier_may_read_special_tokens(keep, text):
    policy = build_policy()
    policy.tokenizer = build_tokenizer(extra_special_tokens=["<user>", "<assistant>"])
    words = policy.tokenizer.convert_tokens_to_ids(["<user>", "1", "1", "<assistant>", "<eos>"])
    options = {"group_size": 1, "max_new_tokens": 5}
    verifier = Verifier(Even(), Reward(keep_special_tokens=keep))
    rollouts = sampled(policy, [Problem("1", None)], Fixed(words), verifier, **options)
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
    rollouts = sampled(policy, problems, engine, group_size=1, max_new_tokens=5)
    assert engine.prompts == [[15, 4], [15, 4]]
    assert rollouts.tokens_N.tolist() == [15, 4, 5, 1] * 2
