"""Two-temperature decoding: which rows get which temperature, in generate and in our engine."""

import pytest
import torch
from transformers import LogitsProcessorList

from tests.trainer.small import build_model, build_tokenizer
from trainer.engines.transformers import TransformersEngine
from trainer.policy import Policy
from trainer.studies.two_temperature_engines import TransformersTwoTemperatures
from trainer.studies.two_temperatures import TwoTemperatures, temper

PROMPTS = [[3, 4, 13, 5, 14], [7, 8]] * 8


def entropy(logits):
    return torch.distributions.Categorical(logits=logits.double()).entropy()


def test_each_row_has_the_temperature_of_its_entropy():
    logits = torch.randn(64, 17, generator=torch.Generator().manual_seed(0)) * 3
    threshold = float(entropy(logits).median())
    above = entropy(logits) > threshold
    got = temper(logits, threshold, 0.5, 2.0).softmax(1)
    want = (logits / torch.where(above, 2.0, 0.5).unsqueeze(1)).softmax(1)
    assert above.any()
    assert not above.all()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [False, True])
def test_temperature_zero_leaves_the_greatest(masked):
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.1, 0.0, 0.2]])
    if masked:
        logits[:, 0] = -torch.inf
    got = temper(logits, 0.9 if not masked else 0.6, 0.0, 1.0).softmax(1)
    assert got[0].tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(got[1], logits[1].softmax(0))


def test_rows_may_have_numbers_of_their_own():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    numbers = torch.tensor([[0.0, 9.0, 1.0], [0.5, 0.6, 0.7], [2.0, 3.0, 4.0]])
    got = temper(logits, *numbers)
    rows = [temper(logits[i : i + 1], *numbers[:, i].tolist()) for i in range(3)]
    torch.testing.assert_close(got, torch.cat(rows))


@pytest.mark.parametrize("bad", [(-1.0, 1.0, 1.0), (0.5, -1.0, 1.0), (0.5, 1.0, float("inf"))])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        TwoTemperatures(*bad)


@pytest.fixture
def policy():
    return Policy(build_model("qwen3", spread=0.5), build_tokenizer())


def sampled(policy, two, temperature=1.0):
    plain = two is None
    engine = (
        TransformersEngine(policy, 16) if plain else TransformersTwoTemperatures(policy, 16, two)
    )
    return engine.sample(PROMPTS, range(len(PROMPTS)), max_new_tokens=12, temperature=temperature)


def tokens(found):
    return [one.tokens.tolist() for one in found]


def test_equal_temperatures_are_one_temperature(policy):
    plain = sampled(policy, None, 0.7)
    two = sampled(policy, TwoTemperatures(0.5, 0.7, 0.7))
    assert tokens(two) == tokens(plain)
    for one, other in zip(two, plain, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs)
    greedy = sampled(policy, TwoTemperatures(0.5, 0.0, 0.0))
    assert tokens(greedy) == tokens(sampled(policy, None, 0.0))


def test_a_threshold_above_all_entropies_leaves_the_low_temperature(policy):
    high = sampled(policy, TwoTemperatures(0.0, 0.0, 1.0))
    assert tokens(sampled(policy, TwoTemperatures(99.0, 0.0, 1.0))) == tokens(
        sampled(policy, None, 0.0)
    )
    assert tokens(high) == tokens(sampled(policy, None, 1.0))


def test_two_temperatures_do_not_come_on_top_of_a_third(policy):
    with pytest.raises(ValueError, match=r"must be 1; got 0\.7"):
        sampled(policy, TwoTemperatures(0.5, 1.0, 1.0), 0.7)


def test_generate_samples_with_them(policy):
    processors = LogitsProcessorList([TwoTemperatures(99.0, 0.0, 1.0)])
    prompt = torch.tensor(PROMPTS[:1])
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 1}
    got = policy.model.generate(prompt, do_sample=True, logits_processor=processors, **options)
    assert got.tolist() == policy.model.generate(prompt, do_sample=False, **options).tolist()
