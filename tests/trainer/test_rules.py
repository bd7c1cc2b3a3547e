"""Rules by name and of one's own: what they choose, and the step that is made of it."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from entropy_kernels import entropy_threshold, token_rules
from tests.trainer.small import (  # noqa: F401
    build_policy,
    metrics,
    on_even,
    save_folder,
    sequences,
    settings,
)
from tests.trainer.test_update import TEMPERATURE
from tests.trainer.update_cases import configure, distance, gradients, off_policy
from trainer.checkpoint.sharded import read_whole
from trainer.config import Algorithm, Eval
from trainer.config.algorithm import OF_FRACTION, OTHERS
from trainer.log import read_run
from trainer.rules import DRAWN, RULES, Choice, Tokens, choose, name_of, rule_named
from trainer.train import train


def tokens(fraction=0.4, seed=0, count=200):
    """Statistics of five responses, fp32."""
    g = torch.Generator().manual_seed(5)
    lengths_B = torch.tensor([count - 60, 1, 30, 20, 9])
    entropy_T = torch.rand(count, generator=g) ** 3
    logprob_T = -8 * torch.rand(count, generator=g)
    advantage_B = torch.tensor([1.0, -0.5, -2.0, 0.25, 0.0])
    threshold = entropy_threshold(entropy_T, fraction=fraction)
    generator = torch.Generator().manual_seed(seed)
    advantage_T = advantage_B.repeat_interleave(lengths_B)
    return Tokens(logprob_T, entropy_T, threshold, advantage_T, lengths_B, fraction, generator)


def test_settings_and_rules_know_the_same_names():
    assert sorted(RULES) == sorted((*OF_FRACTION, *OTHERS))
    assert len(RULES) == len(set(RULES.values()))
    assert set(RULES) > DRAWN


@pytest.mark.parametrize("name", RULES)
def test_a_rule_chooses_its_share(name):
    given = tokens()
    choice = choose(RULES[name], name, given)
    shares = [RULES[name](tokens(seed=seed)).selected_T.float().mean() for seed in range(60)]
    share = float(torch.stack(shares).mean())
    if name in OF_FRACTION:
        assert share == pytest.approx(0.4, abs=0.1)  # the longest has most of the tokens
        assert Algorithm(which=name, fraction=0.4).share == 0.4
    else:
        assert 0 < share <= 1 == Algorithm(which=name, fraction=0.4).share
    assert (choice.weight_T is not None) == (name in ("nat-random", "nat-prefix", "clip-cov"))
    # The same draws of the same seed; others of another, where it draws.
    again, other = (choose(RULES[name], name, tokens(seed=seed)).selected_T for seed in (0, 1))
    assert torch.equal(again, choice.selected_T)
    if name != "clip-cov":  # draws one token here, perhaps the same
        assert torch.equal(other, choice.selected_T) != (name in DRAWN)


def test_rules_are_those_of_the_package():
    x = tokens()
    every = torch.ones(200, dtype=torch.bool)
    found = {name: RULES[name](x).selected_T for name in ("stapo", "rsi", "gmts")}
    stapo = token_rules.silence_spurious(
        x.logprob_T, x.entropy_T, x.advantage_T, every, x.threshold
    )
    assert torch.equal(found["stapo"], stapo)
    assert torch.equal(found["rsi"], token_rules.surprisal_band(x.logprob_T, x.entropy_T, every))
    score_T = x.entropy_T * x.advantage_T.abs()
    assert torch.equal(found["gmts"], score_T >= score_T.sort(descending=True).values[79])
    kept_B = RULES["nat-prefix"](x).kept_length_B
    counted = [
        int(part.sum())
        for part in RULES["nat-prefix"](tokens()).selected_T.split(x.lengths_B.tolist())
    ]
    assert kept_B.tolist() == counted
    assert kept_B[1] == 1


def dense(policy, batch, weight_T, by_sequence):
    """The weighted objective over whole responses, each alone, in fp64, by the model's logits."""
    model, total = policy.model.double(), 0.0
    lengths = batch.rollouts.response_length_B.tolist()
    parts = (x.split(lengths) for x in (batch.old_logprob_T.double(), weight_T.double()))
    each = zip(sequences(batch.rollouts), batch.advantage_B.double(), *parts, strict=True)
    for (prompt, response), a, old, weight in each:
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(1).gather(1, response[:, None]).squeeze(1)
        ratio = (logp - old).exp()
        loss = -(weight * torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)).sum()
        total += loss / (len(lengths) * len(response) if by_sequence else sum(lengths))
    total.backward()
    return float(total.detach()), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("name", ["nat-random", "nat-prefix"])
def test_weights_and_cuts_give_the_gradient_of_the_whole(name, loss_type):
    """In any micro-batches; what was cut is not read, and is in the denominator."""
    policy = build_policy(spread=0.2)
    batch = off_policy(policy)
    lengths_B = batch.rollouts.response_length_B
    advantage_T = batch.advantage_B.repeat_interleave(lengths_B)
    given = batch.old_logprob_T, torch.ones_like(batch.old_logprob_T), batch.threshold, advantage_T
    generator = torch.Generator().manual_seed(2)
    choice = choose(RULES[name], name, Tokens(*given, lengths_B, 0.6, generator))
    batch = replace(
        batch,
        selected_T=choice.selected_T,
        weight_T=choice.weight_T,
        kept_length_B=choice.kept_length_B,
    )
    read, forward = [], type(policy).forward

    def counted(self, packed, *rest):
        read.append(
            len(packed.tokens_RW.flatten()) if packed.mask_RW is None else int(packed.mask_RW.sum())
        )
        return forward(self, packed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy), "forward", counted)
        policy.layout = "padded"
        found = [
            gradients(policy, batch, configure(Algorithm(loss_type=loss_type), tokens=tokens))
            for tokens in (10**6, 20)
        ]
    kept_B = lengths_B if choice.kept_length_B is None else choice.kept_length_B
    wanted = int((batch.rollouts.prompt_length_B + kept_B - 1).sum())
    assert read[0] == wanted == sum(read[1:])
    assert (wanted < int((batch.rollouts.length_B - 1).sum())) == (name == "nat-prefix")
    loss, want = dense(policy, batch, choice.weight_T, loss_type == "grpo")
    for got, told in found:
        assert told["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert distance(got, want) < 1e-5
        share = float(choice.selected_T.float().mean())
        assert told["entropy/selected_fraction"] == pytest.approx(share)
        assert told["head/rows"] == int(lengths_B.sum())


@pytest.mark.parametrize("name", sorted(set(RULES) - {"top", "bottom", "random"}))
def test_a_step_trains_on_what_a_rule_chooses(tmp_path, name):
    model = save_folder(tmp_path / "model", spread=0.2)
    algorithm = Algorithm(min_groups=1, max_rounds=2, which=name, fraction=0.5)
    train(settings(tmp_path, model, steps=1, algorithm=algorithm))
    row = metrics(tmp_path / "run")[1]
    assert row["grad_norm"] > 0
    assert row["updates"] > 0
    assert 0 < row["head/active_rows"] <= row["head/rows"]
    share = row["entropy/selected_fraction"]
    assert 0.2 < share < 0.8 if name in OF_FRACTION else 0 < share <= 1


def half(given: Tokens) -> Choice:
    """A rule of one's own: the tokens that were likelier than one half."""
    return Choice(given.logprob_T > -0.6931)


def test_a_rule_of_one_s_own_by_name_and_as_a_function(tmp_path):
    model, here = save_folder(tmp_path / "model"), f"{__name__}:half"
    algorithm = Algorithm(min_groups=1, max_rounds=2, which=here)
    config = settings(tmp_path, model, name="by-name", steps=2, algorithm=algorithm)
    train(config)
    named = replace(algorithm, which="top")
    train(replace(config, name="function", algorithm=named), rule=half)
    rows = [metrics(tmp_path / name) for name in ("by-name", "function")]
    assert rows[0] == rows[1]
    assert 0 < rows[0][1]["entropy/selected_fraction"] < 1
    for name in ("by-name", "function"):
        assert read_run(tmp_path / name)["config"]["algorithm"]["which"] == here
    kept = [
        read_whole(tmp_path / n / "checkpoints" / "step-000002") for n in ("by-name", "function")
    ]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_a_stopped_run_draws_as_it_would_have(tmp_path):
    model = save_folder(tmp_path / "model")
    algorithm = Algorithm(min_groups=1, max_rounds=2, which="nat-prefix", fraction=0.5)
    config = settings(tmp_path, model, steps=4, algorithm=algorithm, eval=Eval(2, 4))
    train(replace(config, steps=2))
    train(config)
    train(replace(config, name="whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    shares = [row["entropy/selected_fraction"] for row in metrics(tmp_path / "run")[1:]]
    assert len(set(shares)) > 1


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda x: x.entropy_T > 0, " must return a Choice; got a Tensor"),
        (lambda x: Choice(x.entropy_T), r"selected_T must be a bool tensor \(200,\) on cpu; got"),
        (
            lambda x: Choice(x.everything[1:]),
            r"selected_T must be a bool .*got torch.bool \(199,\)",
        ),
        (lambda x: Choice(x.everything, x.everything), "weight_T must be a floating-point tensor"),
        (lambda x: Choice(x.everything, None, x.entropy_T), r"kept_length_B must be an int64"),
        (lambda x: Choice(x.everything, None, x.lengths_B + 1), "must lie between 1 and each"),
        (lambda x: Choice(x.everything, None, x.lengths_B - 1), "must lie between 1 and each"),
    ],
)
def test_what_is_no_choice_names_the_rule(made, says):
    with pytest.raises(ValueError, match=f"^half.*{says}"):
        choose(made, "half", tokens())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.such:rule", "no.such:rule: cannot import no.such: ModuleNotFoundError"),
        ("math:nothing", "has no 'nothing'"),
        ("math:pi", "a float is not callable"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_before_the_start(tmp_path, name, says):
    config = settings(tmp_path, algorithm=Algorithm(which=name))
    with pytest.raises((ValueError, AttributeError), match=says):
        train(config)
    assert not (tmp_path / "run").exists()


def test_names():
    assert name_of(half) == f"{__name__}:half"
    assert rule_named(f"{__name__}:half") is half
    assert rule_named("gmts") is RULES["gmts"]
    with pytest.raises(ValueError, match="a rule is a function; got a int"):
        name_of(3)
    with pytest.raises(ValueError, match=r'which must be one of top, .* or "module:function"; got'):
        Algorithm(which="most")
    for name in (*RULES, "my.own:rule"):
        if name != "top":
            with pytest.raises(ValueError, match=f"which='{name}' needs entropies that are known"):
                Algorithm(which=name, entropy_source="current")
    assert dataclasses.asdict(Algorithm(which="my.own:rule"))["which"] == "my.own:rule"
