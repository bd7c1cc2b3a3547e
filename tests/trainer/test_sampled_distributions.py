"""What transformers' engine says of the distributions that it draws from: entropies, kept sets."""

import itertools
from dataclasses import replace

import pytest
import torch

import entropy_kernels as ek
from tests.trainer.small import EVEN, WORDS, Even, build_policy, make_rollouts, sampled, sequences
from tests.trainer.worlds import run_ranks
from trainer.batch import Rollouts
from trainer.config import NO_TRUNCATION, Reward, Truncation
from trainer.engines import transformers as engines
from trainer.engines.transformers import TransformersEngine
from trainer.ranks import join
from trainer.rewards.verifier import Verifier
from trainer.sampling import sample

EPS = torch.finfo(torch.float32).eps
TRUNCATIONS = [
    pytest.param(Truncation(top_k=3), id="top-k"),
    pytest.param(Truncation(top_p=0.8), id="top-p"),
    pytest.param(Truncation(min_p=0.1), id="min-p"),
    pytest.param(Truncation(top_k=5, top_p=0.9, min_p=0.02), id="all"),
]
OPTIONS = {"group_size": 3, "max_new_tokens": 10, "seed": 5}


def policy_of(eos=(1, 4, 7), **options):
    """Responses end at different steps, so that rows are dropped."""
    policy = build_policy(**options)
    policy.model.generation_config.eos_token_id = list(eos)
    return policy


def draw(policy, engine=None, problems=EVEN[:8], **changes):
    engine = engine or TransformersEngine(policy, 64)
    return sampled(policy, problems, engine, **OPTIONS | changes)


def logits_of(policy, rollouts, dtype):
    """The logits of each response token by one forward per sequence, without a cache."""
    model = policy.model.to(dtype)
    with torch.no_grad():
        found = [
            model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            for prompt, response in sequences(rollouts)
        ]
    policy.model.to(torch.float32)
    return torch.cat(found)


def entropies(logits_TV, temperature, kept=None):
    z = logits_TV / (temperature or 1.0)
    if kept is not None:
        row = torch.arange(len(z)).repeat_interleave(kept.sizes)
        mask = torch.zeros_like(z, dtype=torch.bool)
        mask[row, kept.token_ids] = True
        z = z.masked_fill(~mask, -1e4)
    logp = z.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


@pytest.mark.parametrize("truncation", [NO_TRUNCATION, *TRUNCATIONS])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_entropies_are_those_of_the_model(temperature, truncation):
    """At the sampling temperature, over the kept sets; of the whole vocabulary, if greedy."""
    policy = policy_of()
    rollouts = draw(policy, temperature=temperature, truncation=truncation)
    truncated = bool(temperature) and not truncation.off
    assert (rollouts.kept is not None) == truncated
    exact, plain = (logits_of(policy, rollouts, x) for x in (torch.float64, torch.float32))
    want = entropies(exact, temperature, rollouts.kept)
    error = (rollouts.sampler_entropy_T - want).abs().max()
    floor = 8 * EPS * float(exact.abs().max()) / (temperature or 1.0)
    by_eager = (entropies(plain, temperature, rollouts.kept) - want).abs().max()
    assert error <= 2 * by_eager + floor
    assert float(want.max()) > 0.3
    assert len(rollouts.response_length_B.unique()) > 1


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_logprobs_are_over_the_sets(truncation):
    policy = policy_of()
    rollouts = draw(policy, temperature=0.7, truncation=truncation)
    kept, target = rollouts.kept, rollouts.response_T
    kept.check_values(target, torch.ones_like(target, dtype=torch.bool), len(WORDS))
    z = logits_of(policy, rollouts, torch.float64) / 0.7
    for t, (a, b) in enumerate(itertools.pairwise(kept.offsets.tolist())):
        ids = kept.token_ids[a:b]
        want = z[t, ids].log_softmax(0)[ids == target[t]]
        assert abs(float(want) - float(rollouts.sampler_logprob_T[t])) < 64 * EPS * z.abs().max()
    assert len(kept.sizes.unique()) > 1 or truncation == Truncation(top_k=3)
    # A response ends with a token that was in the set, as any other.
    ends = rollouts.response_length_B.cumsum(0) - 1
    assert set(target[ends][~rollouts.truncated_B].tolist()) <= {1, 4, 7}


class Recording(TransformersEngine):
    """Keeps the logits that it draws from."""

    def process(self, logits_BV):
        self.seen = [*getattr(self, "seen", []), logits_BV.clone()]
        return logits_BV


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_kept_sets_are_those_of_truncate(truncation):
    policy = policy_of()
    engine = Recording(policy, 1)
    rollouts = draw(policy, engine, temperature=0.7, truncation=truncation)
    limits = {name: getattr(truncation, name) for name in ("top_k", "top_p", "min_p")}
    want = ek.truncate(torch.cat(engine.seen), 0.7, **limits)
    assert torch.equal(rollouts.kept.offsets, want.support.offsets)
    assert torch.equal(rollouts.kept.token_ids, want.support.token_ids)
    assert torch.equal(rollouts.sampler_entropy_T, want.entropy)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_sets_do_not_depend_on_the_batch(truncation):
    """Rows leave the batch as they finish; their sets stay in their places."""
    policy = policy_of()
    one = draw(policy, TransformersEngine(policy, 1), truncation=truncation)
    for size in (7, 64):
        other = draw(policy, TransformersEngine(policy, size), truncation=truncation)
        assert torch.equal(one.tokens_N, other.tokens_N)
        assert torch.equal(one.kept.offsets, other.kept.offsets)
        assert torch.equal(one.kept.token_ids, other.kept.token_ids)


def test_a_set_of_one_is_what_greedy_takes():
    policy = policy_of()
    one, greedy = draw(policy, truncation=Truncation(top_k=1)), draw(policy, temperature=0.0)
    assert torch.equal(one.tokens_N, greedy.tokens_N)
    assert torch.equal(one.kept.token_ids, one.response_T)
    assert not one.sampler_logprob_T.any()
    assert not one.sampler_entropy_T.any()
    assert greedy.sampler_entropy_T.min() > 0


@pytest.mark.parametrize("truncation", [NO_TRUNCATION, *TRUNCATIONS])
def test_random_numbers_spread_over_the_distribution(truncation):
    """Evenly spaced ones draw each id in proportion, to one draw, and none outside of its set."""
    logits, count = torch.randn(20, generator=torch.Generator().manual_seed(2)) * 2, 4000
    uniform = (torch.arange(count) + 0.5) / count
    drawn = engines._draw(logits.expand(count, -1), 0.8, truncation, uniform)
    p = (logits.double() / 0.8).softmax(0)
    if not truncation.off:
        ids = drawn.kept.token_ids[: int(drawn.kept.offsets[1])]
        p = torch.zeros_like(p).scatter(0, ids, p[ids])
        p /= p.sum()
    seen = drawn.token.bincount(minlength=20)
    assert not seen[p == 0].any()
    assert float((seen - p * count).abs().max()) <= 1.01
    assert torch.allclose(drawn.logprob.double(), p.log()[drawn.token], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [3, 511, 512, 700, 5000])
def test_a_token_is_where_the_distribution_function_exceeds_the_number(
    vocabulary, temperature, dtype
):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(500, vocabulary, generator=generator) * 3).to(dtype)
    uniform = torch.rand(500, generator=generator)
    drawn = engines._draw(logits, temperature, NO_TRUNCATION, uniform)
    logp = (logits.double() / temperature).log_softmax(1)
    above = logp.exp().cumsum(1).gather(1, drawn.token[:, None])[:, 0]
    p = logp.gather(1, drawn.token[:, None])[:, 0]
    assert (above - p.exp() <= uniform + 1e-6).all()
    assert (uniform <= above + 1e-6).all()
    torch.testing.assert_close(drawn.logprob.double(), p, atol=2e-6, rtol=1e-6)
    # Single precision decides another way only where the number is next to the function.
    exact = torch.searchsorted(logp.exp().cumsum(1), uniform.double()[:, None], right=True)[:, 0]
    assert (exact != drawn.token).sum() <= 1


@pytest.mark.parametrize("vocabulary", [40, 1024, 1500])
def test_a_token_of_no_probability_is_never_drawn(vocabulary):
    """Not by the least number either, nor by the largest, whose product may round up to the sum."""
    prob = torch.zeros(6, vocabulary)
    places = torch.arange(3, vocabulary - 3, 7)
    prob[:, places] = torch.rand(6, len(places), generator=torch.Generator().manual_seed(3))
    prob /= prob.sum(1, keepdim=True)
    for number in (0.0, 2**-24, 0.5, 1 - 2**-24):
        token = engines.invert(prob, torch.full((6,), number))
        assert torch.isin(token, places).all()
    assert (engines.invert(prob, torch.zeros(6)) == 3).all()
    assert (engines.invert(prob, torch.full((6,), 1 - 2**-24)) == places[-1]).all()


def test_a_row_of_nan_is_drawn_and_told_later():
    logits = torch.randn(3, 700)
    logits[1] = torch.nan
    drawn = engines._draw(logits, 1.0, NO_TRUNCATION, torch.full((3,), 0.5))
    assert (drawn.token < 700).all()
    assert drawn.logprob.isnan().tolist() == [False, True, False]


def test_greedy_takes_the_most_probable_with_its_untempered_log_prob():
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(1)) * 3
    drawn = engines._draw(logits, 0.0, NO_TRUNCATION, torch.zeros(50))
    assert torch.equal(drawn.token, logits.argmax(1))
    torch.testing.assert_close(drawn.logprob, logits.log_softmax(1).amax(1))


def rollouts_of(policy, ranks=None):
    verifier = Verifier(Even(), Reward())
    return sample(
        TransformersEngine(policy, 64),
        policy,
        verifier,
        EVEN[:5],
        group_size=3,
        max_new_tokens=8,
        temperature=0.9,
        truncation=Truncation(top_p=0.85),
        seed=2,
        ranks=ranks,
    )


def on_a_rank():
    with join("cpu") as ranks:
        return vars(rollouts_of(policy_of(), ranks))


def test_two_ranks_sample_and_keep_what_one_does(tmp_path):
    want = rollouts_of(policy_of())
    for found in run_ranks(2, on_a_rank, tmp_path / "ranks"):
        assert torch.equal(found["tokens_N"], want.tokens_N)
        assert torch.equal(found["kept"].offsets, want.kept.offsets)
        assert torch.equal(found["kept"].token_ids, want.kept.token_ids)
        torch.testing.assert_close(found["sampler_entropy_T"], want.sampler_entropy_T)


def with_sets(sets, first=0):
    """One token per set, which is its first id."""
    return make_rollouts(
        [[9]] * len(sets),
        [[ids[0]] for ids in sets],
        kept=ek.Support.of(sets),
        sampler_entropy_T=torch.arange(len(sets)) + float(first),
    )


def test_rows_and_parts_keep_their_sets():
    sets = [[3, 1], [2], [5, 4, 0], [1, 7]]
    whole = with_sets(sets)
    some = whole.rows(torch.tensor([2, 0, 2]))
    assert [x.token_ids.tolist() for x in some.kept.split([1, 1, 1])] == [
        sets[i] for i in (2, 0, 2)
    ]
    assert some.sampler_entropy_T.tolist() == [2.0, 0.0, 2.0]
    joined = Rollouts.concatenate([with_sets(sets[:1]), with_sets(sets[1:], 1)])
    assert torch.equal(joined.kept.token_ids, whole.kept.token_ids)
    assert torch.equal(joined.kept.offsets, whole.kept.offsets)
    assert torch.equal(joined.sampler_entropy_T, whole.sampler_entropy_T)
    assert whole.to(torch.device("meta")).kept.token_ids.is_meta
    assert whole.rows(torch.tensor([], dtype=torch.long)).kept.offsets.tolist() == [0]


def test_parts_with_and_without_sets_do_not_mix():
    part = with_sets([[3, 1]])
    with pytest.raises(ValueError, match=r"kept sets must be those of all parts .* 1 of 2 parts"):
        Rollouts.concatenate([part, replace(part, kept=None)])


def test_sets_divided_and_joined_are_the_same():
    whole = ek.Support.of([[1, 2], [], [3], [4, 5, 6]])
    parts = whole.split([1, 0, 3])
    assert [part.sizes.tolist() for part in parts] == [[2], [], [0, 1, 3]]
    again = ek.Support.concatenate(parts)
    assert torch.equal(again.token_ids, whole.token_ids)
    assert torch.equal(again.offsets, whole.offsets)
