"""Sampling: the tokens of `generate`, the probabilities of the softmax, the books that are kept."""

import pytest
import torch

import entropy_kernels as ek
from tests.trainer.small import (
    EOS,
    EVEN,
    PAD,
    POSITIONS,
    WORDS,
    Even,
    build_policy,
    build_tokenizer,
    sampled,
    sequences,
)
from trainer.batch import pack
from trainer.engines.transformers import TransformersEngine
from trainer.tasks.problem import Problem

PROMPTS = EVEN[:8]
WIDTH = 10
OPTIONS = {"group_size": 1, "max_new_tokens": WIDTH, "seed": 5}


def draw(policy, problems=PROMPTS, batch_size=64, **changes):
    engine = TransformersEngine(policy, batch_size)
    return sampled(policy, problems, engine, **OPTIONS | changes)


def set_eos(policy, ids):
    policy.model.generation_config.eos_token_id = ids
    return policy


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_greedy_is_generate(family, attention):
    """Token by token, with prompts of 2 to 8 tokens and rows that end at different steps."""
    # A tied head would repeat the last token.
    built = build_policy(family, attention=attention, tie_word_embeddings=False)
    policy = set_eos(built, [1, 4, 7, 9])
    rollouts = draw(policy, EVEN, temperature=0.0)
    encoded = policy.tokenizer([p.prompt for p in EVEN], padding=True, return_tensors="pt")
    want = policy.model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=False,
        max_new_tokens=WIDTH,
        pad_token_id=policy.tokenizer.pad_token_id,
    )[:, encoded["input_ids"].shape[1] :]
    for (_, response), row in zip(sequences(rollouts), want, strict=True):
        assert torch.equal(response, row[: len(response)])
        assert set(row[len(response) :].tolist()) <= {policy.tokenizer.pad_token_id}
    lengths = rollouts.response_length_B
    assert len(lengths.unique()) >= 3
    assert lengths.max() > lengths.median()


def test_seed_fixes_the_tokens():
    policy = build_policy()
    first, again, other = (draw(policy, group_size=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens_N, again.tokens_N)
    assert first.responses == again.responses
    different = [
        len(one) == len(two) and not torch.equal(one, two)
        for (_, one), (_, two) in zip(sequences(first), sequences(other), strict=True)
    ]
    assert any(different)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_pairs_of_tokens_have_the_probabilities_of_the_softmax(temperature):
    """A chi-square test of the joint distribution of two tokens; the second is drawn with the
    cache, of rows of which some have left."""
    policy, count = build_policy(spread=0.3), 20_000
    rollouts = draw(
        policy, PROMPTS[2:3], group_size=count, max_new_tokens=2, temperature=temperature
    )
    size, eos = len(WORDS), WORDS.index(EOS)
    prompt = sequences(rollouts)[0][0].repeat(size, 1)
    with torch.no_grad():
        tokens = torch.cat([prompt, torch.arange(size)[:, None]], 1)
        p = (policy.model(tokens).logits[:, -2:].double() / temperature).softmax(2)
    joint = p[0, 0][:, None] * p[:, 1]
    joint[eos] = 0.0
    joint[eos, WORDS.index(PAD)] = p[0, 0, eos]

    drawn = torch.nn.utils.rnn.pad_sequence(
        rollouts.split(rollouts.response_T), batch_first=True, padding_value=WORDS.index(PAD)
    )
    cell = drawn[:, 0] * size + drawn[:, 1]
    seen = cell.bincount(minlength=size * size).double()
    expected = joint.flatten() * count
    large = expected >= 5
    seen = torch.cat([seen[large], seen[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    freedom = len(seen) - 1
    chi_square = ((seen - expected).square() / expected).sum()
    assert freedom > 50
    # Mean and standard deviation of chi-square; four of them are one run in ten thousand.
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_responses_end_with_the_end_of_sequence_once():
    policy = set_eos(build_policy(spread=0.1), [1, 5, 8])
    rollouts = draw(policy, group_size=4)
    for b, (_, tokens) in enumerate(sequences(rollouts)):
        response = tokens.tolist()
        ends = [i for i, token in enumerate(response) if token in (1, 5, 8)]
        assert len(response) == (ends[0] + 1 if ends else WIDTH)
        assert bool(rollouts.truncated_B[b]) == (not ends)
        words = [WORDS[token] for token in response[: len(response) - bool(ends)]]
        special = (PAD, EOS, "<unk>")
        assert rollouts.responses[b] == " ".join(word for word in words if word not in special)
        assert rollouts.reward_B[b] == Even().reward(PROMPTS[b // 4], rollouts.responses[b])
    assert 0 < rollouts.truncated_B.sum() < len(rollouts)
    assert 0 < rollouts.reward_B.sum() < len(rollouts)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_groups_are_whole_and_numbered_by_prompt(batch_size):
    """Smaller batches than a group hold one group; prompts keep their tokens."""
    policy = build_policy()
    rollouts = draw(policy, group_size=3, batch_size=batch_size)
    assert rollouts.group_B.tolist() == [g for g in range(8) for _ in range(3)]
    assert rollouts.problems == [p for p in PROMPTS for _ in range(3)]
    for problem, (prompt, _) in zip(rollouts.problems, sequences(rollouts), strict=True):
        assert prompt.tolist() == policy.tokenizer.encode(problem.prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_the_batch(temperature):
    policy = set_eos(build_policy(), [1, 4, 7, 9])
    whole = draw(policy, temperature=temperature, group_size=4)
    for size in (1, 7):
        parts = draw(policy, temperature=temperature, group_size=4, batch_size=size)
        assert torch.equal(whole.tokens_N, parts.tokens_N)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_the_distribution_sampled_from(temperature):
    policy = set_eos(build_policy(), [1, 4, 7])
    rollouts = draw(policy, group_size=4, temperature=temperature)

    def score(head):
        scored = ek.linear_logprob_entropy(head).logprob
        return scored, (head.hidden @ head.weight.T).abs().max() / temperature

    with torch.no_grad():
        scored, largest = policy(pack(rollouts, policy.layout), temperature, score)
    error = (scored - rollouts.sampler_logprob_T).abs().max()
    # Two passes through the backbone, with a cache and without.
    assert error < 32 * torch.finfo(torch.float32).eps * largest
    assert len(rollouts.response_length_B.unique()) > 1


def test_padding_may_be_the_end_of_sequence():
    policy = build_policy(spread=0.1)
    policy.tokenizer = build_tokenizer(pad_token=EOS)
    set_eos(policy, None)
    rollouts = draw(policy, group_size=8)
    last = rollouts.tokens_N[rollouts.length_B.cumsum(0) - 1]
    assert torch.equal(last == WORDS.index(EOS), ~rollouts.truncated_B)
    assert (rollouts.response_T == WORDS.index(EOS)).sum() == (~rollouts.truncated_B).sum()
    assert 0 < rollouts.truncated_B.sum() < len(rollouts)


def test_token_0_may_be_the_end_of_sequence():
    policy = set_eos(build_policy(), 0)
    assert policy.eos_ids.tolist() == [0, 1]


def test_prompts_beyond_the_positions_are_refused():
    long = Problem(" ".join("1" * (POSITIONS - WIDTH + 1)), None)
    with pytest.raises(ValueError, match=r"prompt of 55 tokens .* 10 new .* 64 positions"):
        draw(build_policy(), [long])
    draw(build_policy(), [Problem(" ".join("1" * (POSITIONS - WIDTH)), None)])
