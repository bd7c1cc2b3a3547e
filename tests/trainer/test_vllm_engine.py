"""The vLLM engine against transformers: the same model, whatever weights were pushed last."""

import itertools

import pytest
import torch

from tests.trainer.small import EVEN, WORDS, build_model, build_tokenizer, sampled, settings
from tests.trainer.update_cases import ALONE
from tests.trainer.vllm_cases import IGNORED, SHAPE  # first: it skips where vLLM is missing
from trainer.config import Engine, Rollout, Truncation
from trainer.engines.transformers import TransformersEngine
from trainer.engines.vllm import VllmEngine
from trainer.policy import Policy
from trainer.update import score

pytestmark = IGNORED
EOS = [WORDS.index("<eos>"), WORDS.index("4")]
PROMPTS = [[3, 4, 13, 5, 14], [7], [3, 4, 13, 5, 14], list(range(3, 15)) * 2]
LONG = [3 + 7 * i % 11 for i in range(300)]
BLOCK = 128  # tokens that vLLM caches together on a CPU


def configure(root, placement="inside", **options):
    engine = Engine(kind="vllm", placement=placement, kv_cache_bytes=2**26, **options)
    return settings(root, engine=engine, rollout=Rollout(batch_size=64, temperature=0.7))


# Inside a model with a head of its own, beside one whose head is its embedding.
@pytest.fixture(scope="module", params=[("inside", "llama"), ("beside", "qwen3")], ids=" ".join)
def pair(request, tmp_path_factory):
    """An engine and its policy."""
    placement, family = request.param
    policy = Policy(build_model(family, spread=0.2, **SHAPE), build_tokenizer())
    policy.model.generation_config.eos_token_id = EOS
    threads = torch.get_num_threads()
    config = configure(tmp_path_factory.mktemp("run"), placement)
    engine = VllmEngine(policy, config, policy.device)
    engine.update_weights(policy.weights())
    assert torch.get_num_threads() == threads
    return engine, policy


def move(policy, by=0.05):
    """Other weights, every one of them."""
    generator = torch.Generator().manual_seed(next(MOVES))
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += by * torch.randn(weight.shape, generator=generator)


MOVES = itertools.count()


def greedy(engine, prompts=PROMPTS):
    return engine.sample(prompts, range(len(prompts)), max_new_tokens=24, temperature=0)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.entropies, other.entropies, atol=1e-5, rtol=0)
        assert one.kept is None


def test_is_transformers_greedy_after_every_push(pair):
    engine, policy = pair
    seen = []
    for _ in range(3):
        got = greedy(engine)
        assert_same(got, greedy(TransformersEngine(policy, 64)))
        seen.append([one.tokens.tolist() for one in got])
        move(policy)
        engine.sleep()
        engine.update_weights(policy.weights())
    assert seen[0] != seen[1] != seen[2]
    assert_same(greedy(engine), greedy(TransformersEngine(policy, 64)))


def test_forgets_the_cached_prompt_of_older_weights(pair, monkeypatch):
    engine, policy = pair
    prompts = [LONG, LONG[:-1]]
    greedy(engine, prompts)
    move(policy)
    engine.update_weights(policy.weights())
    want = greedy(TransformersEngine(policy, 64), prompts)
    assert_same(greedy(engine, prompts), want)
    # And had it not, its states of the first two blocks would be the old ones.
    move(policy)
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    engine.update_weights(policy.weights())
    want = greedy(TransformersEngine(policy, 64), prompts)
    with pytest.raises(AssertionError):
        assert_same(greedy(engine, prompts), want)
    monkeypatch.undo()
    engine.update_weights(policy.weights())
    assert len(LONG) > 2 * BLOCK
    assert_same(greedy(engine, prompts), want)


def test_log_probs_are_those_that_the_trainer_scores(pair, tmp_path):
    engine, policy = pair
    rollouts = sampled(policy, EVEN[:4], engine, max_new_tokens=16, temperature=0.7, seed=1)
    logprob_T = score(policy, rollouts, configure(tmp_path), ALONE).logprob_T
    torch.testing.assert_close(rollouts.sampler_logprob_T, logprob_T, atol=1e-5, rtol=0)
    ended = ~rollouts.truncated_B
    assert 0 < ended.sum() < len(rollouts), "of 16 responses some end and some do not"
    for b, tokens in enumerate(rollouts.split(rollouts.response_T)):
        is_eos = torch.isin(tokens, torch.tensor(EOS))
        assert not is_eos[:-1].any()
        assert is_eos[-1] == ended[b]
        assert len(tokens) == 16 or ended[b]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_truncated_responses_come_with_their_sets(pair, temperature):
    """Log-probs and entropies are over them. Greedy ones are not truncated."""
    engine, policy = pair
    options = {"max_new_tokens": 16, "temperature": temperature}
    found = engine.sample(PROMPTS, range(4), **options, truncation=Truncation(top_k=6, top_p=0.9))
    for prompt, one in zip(PROMPTS, found, strict=True):
        n = len(one.tokens)
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + one.tokens.tolist()])).logits[0]
        logits = logits[len(prompt) - 1 : -1].float() / (temperature or 1)
        assert (one.kept is None) == (temperature == 0)
        if one.kept is not None:
            one.kept.check_values(one.tokens, torch.ones(n, dtype=torch.bool), len(WORDS))
            assert one.kept.sizes.max() <= 6
            row = torch.arange(n).repeat_interleave(one.kept.sizes)
            outside = torch.ones_like(logits, dtype=torch.bool)
            outside[row, one.kept.token_ids] = False
            logits = logits.masked_fill(outside, -100.0)
        want = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(one.logprobs, want.log_prob(one.tokens), atol=1e-5, rtol=0)
        torch.testing.assert_close(one.entropies, want.entropy(), atol=1e-5, rtol=0)


def test_a_response_depends_on_its_seed_and_on_no_other_request(pair):
    engine, _ = pair
    options = {"max_new_tokens": 12, "temperature": 1.0}
    prompts = [[7, 8, 9]] * 8
    first = engine.sample(prompts, [*range(7), 2**56 - 1], **options)
    tokens = [one.tokens.tolist() for one in first]
    assert len(set(map(tuple, tokens))) > 4
    again = engine.sample([*PROMPTS, [7, 8, 9]], [90, 91, 92, 93, 3], **options)
    assert again[-1].tokens.tolist() == tokens[3]
    assert engine.sample([[7, 8, 9]], [2**56 - 1], **options)[0].tokens.tolist() == tokens[7]


def test_samples_the_distribution_of_the_model(pair):
    engine, policy = pair
    count, temperature = 2000, 0.7
    prompt = [3, 5, 13]
    answers = engine.sample([prompt] * count, range(count), max_new_tokens=1, temperature=0.7)
    drawn = torch.stack([one.tokens for one in answers]).flatten().bincount(minlength=len(WORDS))
    with torch.no_grad():
        want = (policy.model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(0)
    # 5 standard deviations of each count.
    assert ((drawn / count - want).abs() < 5 * (want / count).sqrt() + 1 / count).all()


def test_weights_go_in_parts_of_any_size(pair, monkeypatch):
    engine, policy = pair
    monkeypatch.setattr("trainer.engines.vllm_weights.CHUNK_BYTES", 1)
    move(policy)
    engine.update_weights(policy.weights())
    assert_same(greedy(engine), greedy(TransformersEngine(policy, 64)))


def test_nothing_is_asked_of_an_engine_without_prompts(pair):
    engine, _ = pair
    assert engine.sample([], [], max_new_tokens=4, temperature=1.0) == []


def test_a_prompt_that_does_not_fit_raises(pair):
    engine, _ = pair
    with pytest.raises(ValueError, match="a prompt of 500 tokens and up to 13 new ones"):
        engine.sample([[3] * 500], [0], max_new_tokens=13, temperature=0)
    assert len(engine.sample([[3] * 500], [0], max_new_tokens=12, temperature=0)) == 1
