"""Rollouts by rows, packed and dealt to ranks: each token once, each sequence as if alone."""

import re
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies

import trainer
from tests.marks import sampled
from tests.trainer.small import FAMILIES, build_policy, make_rollouts, sequences
from tests.trainer.update_cases import configure, distance, gradients, off_policy, roll
from trainer.batch import Rollouts, arrange, pack, partition
from trainer.model import probes
from trainer.policy import check_policy

pytestmark = sampled(0.2)

TRAINER = Path(trainer.__file__).parent
SHAPES = strategies.lists(
    strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 9)), min_size=1, max_size=12
)
LAYOUTS = ("row", "rows", "padded")
MODELS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    if attention == "eager" or family not in ("gemma2", "bloom")  # which have no sdpa
]


def rollouts(shape):
    """Prompts and responses of the lengths of `shape`. A token is 100 times its sequence plus its
    place there, from 1."""
    prompts = [range(100 * b + 1, 100 * b + p + 1) for b, (p, _) in enumerate(shape)]
    responses = [range(100 * b + p + 1, 100 * b + p + r + 1) for b, (p, r) in enumerate(shape)]
    return make_rollouts(prompts, responses)


def test_nothing_is_padded_between_engine_and_loss():
    """Only the rows that a backbone reads, [R, W], and what transformers samples have padding."""
    padding = re.compile(r"_B[LP]\b|pad_sequence")
    found = [path for path in TRAINER.rglob("*.py") if padding.search(path.read_text())]
    assert found == [TRAINER / "engines" / "transformers.py"]


@hypothesis.given(shape=SHAPES, data=strategies.data())
@hypothesis.settings(deadline=None, derandomize=True)
def test_rows_take_their_tokens_with_them(shape, data):
    """In any order and number; `concatenate` puts sequences one after the other."""
    whole = rollouts(shape)
    whole = replace(whole, sampler_logprob_T=-whole.response_T.float())
    index = data.draw(strategies.lists(strategies.integers(0, len(shape) - 1), max_size=12))
    some = whole.rows(torch.tensor(index, dtype=torch.long))
    want = sequences(whole)
    for b, (prompt, response) in zip(index, sequences(some), strict=True):
        assert (prompt.tolist(), response.tolist()) == tuple(x.tolist() for x in want[b])
    assert some.group_B.tolist() == index
    assert torch.equal(some.sampler_logprob_T, -some.response_T.float())
    assert torch.equal(whole.response_T[whole.places(some.group_B)], some.response_T)
    assert [len(x) for x in some.split(some.response_T)] == some.response_length_B.tolist()
    parts = [whole.rows(torch.tensor([b])) for b in range(len(shape))]
    for name, value in vars(Rollouts.concatenate(parts)).items():
        own = getattr(whole, name)
        assert torch.equal(value, own) if torch.is_tensor(own) else value == own


@hypothesis.given(shape=SHAPES, layout=strategies.sampled_from(LAYOUTS))
@hypothesis.settings(deadline=None, derandomize=True)
def test_every_token_once_with_its_position(shape, layout):
    whole = rollouts(shape)
    packed = pack(whole, layout)
    tokens, position = packed.tokens_RW, packed.positions_RW
    real = tokens > 0
    read = [100 * b + i + 1 for b, (p, r) in enumerate(shape) for i in range(p + r - 1)]
    assert sorted(tokens[real].tolist()) == read
    assert torch.equal(position[real], tokens[real] % 100 - 1)
    # Whole sequences, without a gap.
    inside = real[:, 1:] & (position[:, 1:] > 0)
    assert torch.equal(tokens[:, 1:][inside], tokens[:, :-1][inside] + 1)
    # The state before each response token predicts it.
    assert torch.equal(packed.target_T, whole.response_T)
    assert torch.equal(tokens.flatten()[packed.index_T] + 1, packed.target_T)
    longest = int(whole.length_B.max()) - 1
    if layout == "row":
        assert real.all()
        assert len(tokens) == 1
    else:
        assert tokens.shape[1] == longest
        assert len(tokens) <= len(shape)
    if layout == "padded":
        assert torch.equal(packed.mask_RW, real)
        assert len(tokens) == len(shape)
    else:
        assert packed.mask_RW is None
        assert not position[~real].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_without_a_token_is_never_packed(layout):
    whole = rollouts([(2, 3), (0, 2)])
    with pytest.raises(AssertionError, match="a prompt without a token"):
        pack(whole, layout)


def test_short_sequences_share_rows():
    """First fit, longest first: [7], [5, 2], [4, 3], [1]."""
    packed = pack(rollouts([(1, 1), (2, 2), (1, 2), (3, 5), (4, 2), (2, 3)]), "rows")
    assert packed.tokens_RW.shape == (4, 7)
    assert packed.tokens_RW[:, 0].tolist() == [301, 401, 501, 1]
    assert packed.tokens_RW[1].tolist() == [401, 402, 403, 404, 405, 201, 202]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sequence_is_a_token_that_predicts_nothing(layout):
    policy = build_policy()
    packed = pack(rollouts([(2, 3)]).rows(torch.tensor([], dtype=torch.long)), layout)
    assert packed.tokens_RW.shape == (1, 1)
    hidden = policy(packed, 1.0, lambda head: head.hidden)
    assert hidden.shape == (0, 16)
    hidden.sum().backward()
    assert all(not p.grad.any() for p in policy.model.base_model.parameters())


@pytest.mark.parametrize(("family", "attention"), MODELS)
def test_gradients_of_packed_rows_are_those_of_padded_ones(family, attention):
    """fp32 rounding apart, in every layout that the check at loading allows."""
    drops = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if family == "gpt2" else ()
    options = dict.fromkeys(drops, 0.0)
    policy = build_policy(family, spread=0.2, attention=attention, **options)
    assert policy.layout == ("padded" if family == "bloom" else "rows")
    batch = off_policy(policy)
    policy.layout = "padded"
    want, expected = gradients(policy, batch, configure())
    assert 0 <= expected.pop("mismatch/difference") < 1e-6
    if family == "bloom":
        return
    for layout in ("row", "rows") if attention == "sdpa" else ("rows",):
        policy.layout = layout
        got, metrics = gradients(policy, batch, configure())
        assert distance(got, want) < 2e-6
        # A mean of |log r| of equal policies is rounding alone, which differs by layout.
        assert 0 <= metrics.pop("mismatch/difference") < 1e-6
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_states_are_those_of_each_sequence_alone(family):
    policy = build_policy(family)
    batch = roll(policy)

    def states(rows):
        return policy(pack(rows, policy.layout), 1.0, lambda head: head.hidden)

    with torch.no_grad():
        together = states(batch)
        alone = torch.cat([states(batch.rows(torch.tensor([b]))) for b in range(len(batch))])
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_a_model_that_mixes_packed_sequences_gets_padded_ones(dtype, spread):
    """BLOOM takes positions from the attention mask; the others are told apart from it."""
    for family in FAMILIES:
        policy = build_policy(family, spread=spread)
        policy.model.to(dtype)
        assert probes.choose_layout(policy) == ("padded" if family == "bloom" else "rows"), family


def test_a_model_that_ignores_positions_gets_padded_ones(monkeypatch):
    policy = build_policy()
    forward = policy.model.model.forward
    mixed = lambda position_ids, **options: forward(**options)  # noqa: E731
    monkeypatch.setattr(policy.model.model, "forward", mixed)
    assert probes.choose_layout(policy) == "padded"


def test_attention_by_lengths_reads_one_row(monkeypatch):
    """Its kernels need a GPU; here another attention stands in for them."""
    policy = build_policy(attention="sdpa")
    monkeypatch.setattr(probes, "is_flash", lambda name: name == "sdpa")
    check_policy(policy)
    assert policy.layout == "row"


def test_arranged_tokens_are_found_again():
    tokens, length_B = torch.arange(1, 15), torch.tensor([7, 4, 3])
    for layout in LAYOUTS:
        packed = arrange(tokens, length_B, layout)
        assert torch.equal(packed.tokens_RW.flatten()[packed.index_T], tokens)


def test_packing_reads_fewer_tokens():
    shape = [(2, n) for n in (30, 3, 4, 5, 6, 7, 8, 20)]
    sizes = [pack(rollouts(shape), layout).tokens_RW.numel() for layout in LAYOUTS]
    assert sizes[0] == sum(p + r - 1 for p, r in shape)
    assert sizes[0] <= sizes[1] <= 1.2 * sizes[0] < sizes[2]


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 50), max_size=40),
    ranks=strategies.integers(1, 5),
    budget=strategies.integers(1, 200),
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_every_sequence_once_within_the_budget(lengths, ranks, budget):
    parts = partition(lengths, ranks, budget)
    assert {len(part) for part in parts} == {ranks}
    every = [rows for part in parts for rows in part]
    assert sorted(row for rows in every for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in every)
    tokens = [sum(lengths[row] for row in rows) for rows in every]
    assert max(tokens) <= max(budget, *lengths, 1)
    assert tokens == sorted(tokens, reverse=True)
    # The last sequence of the fullest part went where there were the fewest tokens.
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    # No fewer hold them, but for what does not divide: the fullest could not take two parts more.
    least = -(-sum(lengths) // (ranks * max(budget, *lengths, 1)))
    assert max(1, least) <= len(parts) <= 2 * least + 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_fits_is_one_micro_batch(ranks):
    lengths = [5, 3, 8, 2, 2, 6, 9, 4]
    assert len(partition(lengths, ranks, 48 // ranks)) == 1
    assert len(partition(lengths, ranks, 24 // ranks)) == 2
    assert partition(lengths, 1, 39) == [[list(range(8))]]


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "sizes"),
    [
        pytest.param([7] * 24, 2, 21, [[3, 3]] * 4, id="equal sequences are dealt evenly"),
        pytest.param([4], 3, 10, [[1, 0, 0]], id="ranks without a sequence"),
        pytest.param([], 2, 10, [[0, 0]], id="no sequence"),
        pytest.param([30] * 3, 1, 10, [[1]] * 3, id="beyond the budget alone"),
    ],
)
def test_how_many_sequences_are_dealt(lengths, ranks, budget, sizes):
    assert [list(map(len, part)) for part in partition(lengths, ranks, budget)] == sizes
